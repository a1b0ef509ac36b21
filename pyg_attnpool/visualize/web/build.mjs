// Builds viewer.html and report.html, the pages without their content: `npm ci && npm run build`.
//   src/kernels.ts -> src/kernels.wasm   by AssemblyScript
//   src/*.js + three + kernels.wasm      by esbuild, tree-shaken and minified
//   src/*.html + src/*.css               around them
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

async function bundled(entry) {
  const { outputFiles } = await build({
    absWorkingDir: import.meta.dirname,
    entryPoints: [`src/${entry}`],
    bundle: true,
    format: "esm",
    minify: true,
    write: false,
    target: "es2022",
    loader: { ".wasm": "binary" },
    legalComments: "none", // the whole licence stands above the script
  });
  return outputFiles[0].text.trim();
}

const licence = read("node_modules/three/LICENSE");
writeFileSync(new URL("LICENSE.three", import.meta.url), licence);
const { version } = JSON.parse(read("node_modules/three/package.json"));
for (const [name, html, css, script] of [
  ["viewer.html", "page.html", "style.css", "main.js"],
  ["report.html", "report.html", "report.css", "report.js"],
]) {
  const parts = {
    "/*style*/": await bundled(css),
    "/*licence*/": `/* three.js ${version} is part of this script:\n\n${licence.trim()}\n*/`,
    "/*script*/": (await bundled(script)).replaceAll("</script", "<\\/script"),
  };
  let page = read(`src/${html}`);
  for (const [mark, text] of Object.entries(parts)) page = page.replace(mark, () => text);
  writeFileSync(new URL(name, import.meta.url), page);
}
