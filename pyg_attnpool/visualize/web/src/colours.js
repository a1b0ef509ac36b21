// The scale viridis, as matplotlib's: eleven of its colours, between which we interpolate.
const VIRIDIS = [
  "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c",
  "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725",
];
const SIZE = 256;

export const gradient = `linear-gradient(to right, ${VIRIDIS.join(", ")})`;

// Linear RGB, which WebGL lights.
const table = new Float32Array(3 * SIZE);
const stops = VIRIDIS.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255));
for (let i = 0; i < SIZE; i++) {
  const at = (i / (SIZE - 1)) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  for (let c = 0; c < 3; c++) {
    const value = stops[low][c] + (at - low) * (stops[low + 1][c] - stops[low][c]);
    table[3 * i + c] = value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  }
}

export function colourise(values, top, out) {
  const factor = (SIZE - 1) / top;
  for (let i = 0; i < values.length; i++) {
    const at = 3 * Math.min(Math.round(values[i] * factor), SIZE - 1);
    out[3 * i] = table[at];
    out[3 * i + 1] = table[at + 1];
    out[3 * i + 2] = table[at + 2];
  }
}

// The end of a scale: 1, 2 or 5 times a power of ten, at least `value`.
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-9)));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.9999);
}
