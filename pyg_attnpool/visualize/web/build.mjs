// Builds viewer.html, the page without a model: `npm ci && npm run build`.
//   src/kernels.ts -> src/kernels.wasm   by AssemblyScript
//   src/*.js + three + kernels.wasm      by esbuild, tree-shaken and minified
//   src/page.html + src/style.css        around them
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const read = (path) => readFileSync(new URL(path, import.meta.url), "utf8");

execFileSync(
  process.execPath,
  [
    "node_modules/assemblyscript/bin/asc.js", "src/kernels.ts", "-O3", "--noAssert",
    "--runtime", "stub", "--enable", "simd", "--importMemory", "--memoryBase", "1024", "-o", "src/kernels.wasm",
  ],
  { cwd: import.meta.dirname, stdio: "inherit" },
);

const { outputFiles } = await build({
  absWorkingDir: import.meta.dirname,
  entryPoints: ["src/main.js"],
  bundle: true,
  format: "esm",
  minify: true,
  write: false,
  target: "es2022",
  loader: { ".wasm": "binary" },
  legalComments: "none", // the whole licence stands above the script
});
const script = outputFiles[0].text.replaceAll("</script", "<\\/script");
const css = (
  await build({
    absWorkingDir: import.meta.dirname,
    entryPoints: ["src/style.css"],
    minify: true,
    write: false,
  })
).outputFiles[0].text;

const licence = read("node_modules/three/LICENSE");
writeFileSync(new URL("LICENSE.three", import.meta.url), licence);
const { version } = JSON.parse(read("node_modules/three/package.json"));
const parts = {
  "/*style*/": css.trim(),
  "/*licence*/": `/* three.js ${version} is part of this script:\n\n${licence.trim()}\n*/`,
  "/*script*/": script.trim(),
};
let page = read("src/page.html");
for (const [mark, text] of Object.entries(parts)) page = page.replace(mark, () => text);
writeFileSync(new URL("viewer.html", import.meta.url), page);
