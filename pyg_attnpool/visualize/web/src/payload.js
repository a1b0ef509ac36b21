// What Python has written into the page: a description in JSON, and all arrays in one block of
// bytes, compressed. The description names an array by {array: i}.

const TYPES = {
  int16: Int16Array,
  uint16: Uint16Array,
  int32: Int32Array,
  float32: Float32Array,
};

export async function readPayload(json, base64) {
  const description = JSON.parse(json);
  const compressed = Uint8Array.from(atob(base64.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = await new Response(stream).arrayBuffer();
  const arrays = description.arrays.map(({ dtype, shape, offset, scale }) => {
    const length = shape.reduce((a, b) => a * b, 1);
    const stored = new TYPES[dtype](bytes, offset, length);
    // Quantised numbers are multiples of a scale, indices are 32 bits wide from here on.
    const data = scale
      ? Float32Array.from(stored, (value) => value * scale)
      : dtype === "uint16"
        ? Int32Array.from(stored)
        : stored;
    return { data, shape };
  });
  return resolve(description.content, arrays);
}

function resolve(node, arrays) {
  if (Array.isArray(node)) return node.map((item) => resolve(item, arrays));
  if (node === null || typeof node !== "object") return node;
  if ("array" in node) return arrays[node.array];
  return Object.fromEntries(Object.entries(node).map(([k, v]) => [k, resolve(v, arrays)]));
}
