// Decodes codes as the page does, without a browser: node decode.mjs WEB PAGE < codes > vertices
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [web, page] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(join(web, "src", name)));
const { readPayload } = await load("payload.js");
const { createDecoder } = await load("decoder.js");

const text = readFileSync(page, "utf8");
const block = (id) => text.match(new RegExp(`id="${id}">([^<]*)</script>`))[1];
const model = await readPayload(block("model"), block("arrays"));
const decoder = await createDecoder(model.plan, readFileSync(join(web, "src", "kernels.wasm")));
const codes = JSON.parse(readFileSync(0, "utf8"));
const { numVertices, channels, stride } = decoder;
const out = codes.map((code) => {
  const features = decoder.decode(code);
  return Array.from({ length: numVertices }, (_, i) =>
    [...features.subarray(i * stride, i * stride + channels)],
  );
});
process.stdout.write(JSON.stringify(out));
