// Meshes as files, in the model's unit.

export function toObj(position, faces) {
  const lines = [];
  for (let i = 0; i < position.length; i += 3) {
    lines.push(`v ${text(position[i])} ${text(position[i + 1])} ${text(position[i + 2])}`);
  }
  for (let i = 0; i < faces.length; i += 3) {
    lines.push(`f ${faces[i] + 1} ${faces[i + 1] + 1} ${faces[i + 2] + 1}`);
  }
  return new Blob([lines.join("\n"), "\n"], { type: "model/obj" });
}

// Nine digits tell single precision numbers apart.
const text = (value) => String(Number(value.toPrecision(9)));

export function toPly(position, faces) {
  const header = [
    "ply",
    "format binary_little_endian 1.0",
    `element vertex ${position.length / 3}`,
    ...["x", "y", "z"].map((axis) => `property float ${axis}`),
    `element face ${faces.length / 3}`,
    "property list uchar int vertex_indices",
    "end_header\n",
  ].join("\n");
  const body = new DataView(new ArrayBuffer(4 * position.length + (13 * faces.length) / 3));
  position.forEach((value, i) => body.setFloat32(4 * i, value, true));
  let at = 4 * position.length;
  for (let i = 0; i < faces.length; i += 3) {
    body.setUint8(at, 3);
    for (let c = 0; c < 3; c++) body.setInt32(at + 1 + 4 * c, faces[i + c], true);
    at += 13;
  }
  return new Blob([header, body], { type: "model/ply" });
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
