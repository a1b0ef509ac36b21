import { colourise, gradient, roundUp } from "./colours.js";
import { createDecoder } from "./decoder.js";
import { save, toObj, toPly } from "./files.js";
import wasm from "./kernels.wasm";
import { readPayload } from "./payload.js";
import { Stage } from "./scene.js";
import { makeTheme } from "./theme.js";

const $ = (id) => document.getElementById(id);
const REDUCED = matchMedia("(prefers-reduced-motion: reduce)");
const LEG = 2200; // milliseconds from one mesh to the other
const RANGE = 3; // standard deviations on either side of the mean

// The page ##########################################################################

class Viewer {
  constructor(model, decoder) {
    this.model = model;
    this.decoder = decoder;
    this.faces = model.faces.data;
    const { mean, std, moved } = model.latent;
    this.code = Float64Array.from(mean);
    // On a small stage tools and legend need room above and below the mesh.
    const margin = () => ($("canvas").clientHeight < 520 ? 1.45 : 1.22);
    this.stage = new Stage($("canvas"), this.faces, decoder.numVertices, margin);
    this.meshes = model.meshes.map((mesh) => ({ ...mesh, code: Float64Array.from(mesh.code) }));
    this.values = new Float32Array(decoder.numVertices);
    this.top = 0;

    this.decode();
    this.meanMesh = this.stage.position.slice();
    this.stage.resize();
    this.stage.frame();

    // What moves the surface most comes first; what never varied in training has no slider.
    this.order = mean.map((_, i) => i).filter((i) => std[i] > 1e-9 * (Math.abs(mean[i]) + 1));
    this.order.sort((a, b) => moved[b] - moved[a]);
    this.text();
    this.makeSliders();
    this.makePath();
    this.makeScrolling();
    this.makeColours();
    this.makeSave();
    this.makeTools();
    addEventListener("keydown", (event) => this.key(event));
    this.refresh();
  }

  // The mesh of the code, into the vertices of the stage; in metres.
  decode() {
    const { decoder, stage } = this;
    const features = decoder.decode(this.code);
    const { stride } = decoder;
    for (let i = 0, j = 0; i < stage.position.length; i += 3, j += stride) {
      stage.position[i] = features[j];
      stage.position[i + 1] = features[j + 1];
      stage.position[i + 2] = features[j + 2];
    }
  }

  // Everything that follows from the code. `from` is the control that has set it, if any.
  refresh(from) {
    this.decode();
    this.stage.moved();
    this.colour();
    if (from !== "slider") for (const slider of this.sliders) slider.show();
    if (from !== "between") this.release();
  }

  setCode(code, from) {
    this.code.set(code);
    this.refresh(from);
  }

  // Moves to a code in a third of a second.
  moveTo(code) {
    this.pause();
    cancelAnimationFrame(this.moving);
    const start = this.code.slice();
    const begin = performance.now();
    const step = (now) => {
      const t = REDUCED.matches ? 1 : Math.min(1, (now - begin) / 350);
      const eased = t * t * (3 - 2 * t);
      this.setCode(t < 1 ? mix(start, code, eased) : code);
      if (t < 1) this.moving = requestAnimationFrame(step);
    };
    step(performance.now());
  }

  text() {
    const { model, decoder } = this;
    $("panel").querySelector("h1").textContent = model.title;
    const dimensions = model.latent.mean.length;
    $("about").textContent =
      `${decoder.numVertices.toLocaleString("en")} vertices, ` +
      `${dimensions} latent dimension${dimensions === 1 ? "" : "s"}`;
    const still = dimensions - this.order.length;
    $("still").hidden = still === 0;
    $("still").textContent =
      still === 1
        ? "One dimension has not varied in training and has no slider."
        : `${still} dimensions have not varied in training and have no slider.`;
  }

  // Shape ##############################################################################

  makeSliders() {
    const { mean, std, moved } = this.model.latent;
    this.sliders = this.order.map((d) => {
      const row = document.createElement("div");
      row.className = "slider";
      row.title =
        `z[${d}] in Python. From −2σ to +2σ the surface moves ` +
        `${moved[d].toPrecision(2)} mm in the mean.`;
      const label = document.createElement("label");
      label.textContent = `Dimension ${d + 1}`;
      label.htmlFor = `z${d}`;
      const output = document.createElement("output");
      output.htmlFor = `z${d}`;
      const input = document.createElement("input");
      Object.assign(input, { id: `z${d}`, type: "range", min: -RANGE, max: RANGE, step: 0.01 });
      row.append(label, output, input);
      $("sliders").append(row);
      const show = () => {
        const value = (this.code[d] - mean[d]) / std[d];
        input.value = value;
        mark();
      };
      const mark = () => {
        const value = (this.code[d] - mean[d]) / std[d];
        output.textContent = sigmas(value);
        input.setAttribute("aria-valuetext", `${sigmas(value)}, standard deviations`);
        fill(input, 0, value);
      };
      input.addEventListener("input", () => {
        this.pause();
        cancelAnimationFrame(this.moving);
        this.code[d] = mean[d] + Number(input.value) * std[d];
        mark();
        this.soon("slider");
      });
      input.addEventListener("dblclick", () => {
        this.code[d] = mean[d];
        show();
        this.soon("slider");
      });
      return { show, dimension: d };
    });
    $("random").onclick = () => this.random();
    $("mean").onclick = () => this.moveTo(Float64Array.from(mean));
  }

  // One decode per frame, however often a slider reports.
  soon(from) {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = null;
      this.refresh(from);
    });
  }

  random() {
    const { mean, factor } = this.model.latent;
    const noise = mean.map(gaussian);
    this.moveTo(mean.map((m, i) => m + dot(factor[i], noise)));
  }

  // Between two meshes #################################################################

  makePath() {
    for (const [select, index] of [[$("from"), 0], [$("to"), 1]]) {
      select.replaceChildren(...this.meshes.map((mesh, i) => new Option(mesh.name, i)));
      select.value = Math.min(index, this.meshes.length - 1);
      select.onchange = () => {
        this.pause();
        $("between").value = select.id === "to" ? 1 : 0;
        this.travel();
        this.offerError();
      };
    }
    $("between").addEventListener("input", () => {
      this.pause();
      cancelAnimationFrame(this.moving);
      this.travel();
    });
    $("play").onclick = () => (this.playing ? this.pause() : this.play());
    $("keep").onclick = () => this.keep();
    fill($("between"), 0, 0);
  }

  // A finger that scrolls the page first moves the slider under it: this is taken back.
  makeScrolling() {
    let code, t;
    $("panel").addEventListener("pointerdown", () => {
      code = this.code.slice();
      t = $("between").value;
    });
    $("panel").addEventListener("pointercancel", (event) => {
      if (event.target.type !== "range") return;
      cancelAnimationFrame(this.waiting);
      this.waiting = null;
      $("between").value = t;
      fill($("between"), 0, t);
      this.setCode(code, "between");
    });
  }

  chosen(id) {
    return this.meshes[Number($(id).value)];
  }

  travel() {
    const t = Number($("between").value);
    fill($("between"), 0, t);
    this.setCode(mix(this.chosen("from").code, this.chosen("to").code, t), "between");
  }

  play() {
    cancelAnimationFrame(this.moving);
    let phase = Math.acos(1 - 2 * Number($("between").value)) / Math.PI;
    let before = performance.now();
    const step = (now) => {
      phase += (now - before) / LEG;
      before = now;
      $("between").value = (1 - Math.cos(phase * Math.PI)) / 2;
      this.travel();
      this.playing = requestAnimationFrame(step);
    };
    this.playing = requestAnimationFrame(step);
    this.showPlaying();
  }

  pause() {
    cancelAnimationFrame(this.playing);
    this.playing = null;
    this.showPlaying();
  }

  showPlaying() {
    $("play").classList.toggle("playing", Boolean(this.playing));
    $("play").setAttribute("aria-label", this.playing ? "Pause" : "Play");
  }

  // The mesh is no longer one between the two.
  release() {
    $("between").value = 0;
    fill($("between"), 0, 0);
  }

  keep() {
    this.kept = (this.kept ?? 0) + 1;
    const mesh = { name: `Kept ${this.kept}`, code: this.code.slice(), residual: null };
    this.meshes.push(mesh);
    for (const id of ["from", "to"]) $(id).append(new Option(mesh.name, this.meshes.length - 1));
    $("to").value = this.meshes.length - 1;
    $("between").value = 1;
    fill($("between"), 0, 1);
    this.offerError();
  }

  // Colour #############################################################################

  makeColours() {
    $("legend-bar").style.background = gradient;
    for (const input of document.getElementsByName("colour")) {
      input.onchange = () => {
        this.top = 0;
        this.colour();
      };
    }
    this.offerError();
  }

  get mode() {
    return document.querySelector("[name=colour]:checked").value;
  }

  // Errors are known of meshes that came with the page.
  offerError() {
    const target = this.errorTarget();
    const input = document.querySelector("[value=error]");
    input.disabled = target === null;
    input.parentElement.title = target
      ? `How far each vertex is from ${target.name}`
      : "Known of meshes that were stored with the page: choose one above";
    if (target === null && this.mode === "error") {
      document.querySelector("[value=plain]").checked = true;
    }
    this.colour();
  }

  errorTarget() {
    // The nearer of the two meshes first.
    const pair = [this.chosen("from"), this.chosen("to")];
    if (Number($("between").value) > 0.5) pair.reverse();
    return pair.find((mesh) => mesh.residual) ?? null;
  }

  // The true vertices of a stored mesh: what the model makes of its code, and what is missing.
  truth(mesh) {
    if (!mesh.truth) {
      const { decoder } = this;
      const features = decoder.decode(mesh.code);
      mesh.truth = mesh.residual.data.map(
        (r, i) => r + features[Math.floor(i / 3) * decoder.stride + (i % 3)],
      );
    }
    return mesh.truth;
  }

  colour() {
    const { mode, stage, values } = this;
    $("legend").hidden = mode === "plain";
    $("colour-note").textContent = "";
    if (mode === "plain") return stage.coloured(false);
    const target = mode === "error" ? this.errorTarget() : null;
    const other = target ? this.truth(target) : this.meanMesh;
    const { position } = stage;
    let sum = 0;
    for (let i = 0; i < values.length; i++) {
      const x = position[3 * i] - other[3 * i];
      const y = position[3 * i + 1] - other[3 * i + 1];
      const z = position[3 * i + 2] - other[3 * i + 2];
      values[i] = 1000 * Math.sqrt(x * x + y * y + z * z);
      sum += values[i];
    }
    // The scale ends near the 99th percentile, in steps, so that colours stay comparable while a
    // slider moves.
    const sorted = values.slice().sort();
    const high = sorted[Math.floor(0.99 * (sorted.length - 1))];
    if (high > this.top || high < 0.3 * this.top) this.top = Math.max(roundUp(high), 0.01);
    colourise(values, this.top, stage.color);
    stage.coloured(true);
    const ticks = $("legend-ticks").children;
    ticks[1].textContent = trim(this.top / 2);
    ticks[2].textContent = `${trim(this.top)} mm +`;
    $("legend-title").textContent = target
      ? `Distance from ${target.name}`
      : "Distance from the mean mesh";
    const [mean, largest] = [sum / values.length, sorted.at(-1)];
    $("colour-note").textContent = `Mean ${mean.toFixed(2)} mm, largest ${largest.toFixed(2)} mm.`;
  }

  // Save ###############################################################################

  makeSave() {
    const { title, unit } = this.model;
    const name = title.replace(/[^\p{L}\p{N}._-]+/gu, "_") || "mesh";
    const names = { m: "metres", cm: "centimetres", mm: "millimetres" };
    const note = `OBJ and PLY are in ${names[unit]}.`;
    $("save-note").textContent = note;
    $("obj").onclick = () => save(this.file("obj"), `${name}.obj`);
    $("ply").onclick = () => save(this.file("ply"), `${name}.ply`);
    $("png").onclick = () => {
      this.stage.draw();
      $("canvas").toBlob((blob) => save(blob, `${name}.png`));
    };
    $("code").onclick = async () => {
      const text = `[${[...this.code].map((v) => Number(v.toPrecision(7))).join(", ")}]`;
      try {
        await navigator.clipboard.writeText(text);
        $("save-note").textContent = "The latent code is in the clipboard.";
      } catch {
        $("save-note").textContent = text; // where a page may not write to the clipboard
      }
      clearTimeout(this.note);
      this.note = setTimeout(() => ($("save-note").textContent = note), 6000);
    };
  }

  // The mesh in the model's unit.
  file(kind) {
    const position = this.stage.position.map((value) => value / this.model.metres);
    return (kind === "obj" ? toObj : toPly)(position, this.faces);
  }

  // View ###############################################################################

  makeTools() {
    $("view").onclick = () => this.stage.front();
    $("help").onclick = () => $("dialog").showModal();
    $("dialog").addEventListener("click", (event) => {
      if (event.target === $("dialog")) $("dialog").close(); // the ground around it
    });
    this.switchTheme = makeTheme($("theme"), (theme) => this.stage.setTheme(theme));
  }

  nextColour() {
    const inputs = [...document.getElementsByName("colour")].filter((input) => !input.disabled);
    const at = inputs.findIndex((input) => input.checked);
    inputs[(at + 1) % inputs.length].click();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("dialog").open) return;
    const { tagName, type } = event.target;
    if (tagName === "SELECT") return;
    const actions = {
      r: () => this.random(),
      m: () => $("mean").click(),
      k: () => this.keep(),
      c: () => this.nextColour(),
      v: () => this.stage.front(),
      d: () => this.switchTheme(),
      "?": () => $("dialog").showModal(),
      "+": () => this.stage.zoom(0.9),
      "=": () => this.stage.zoom(0.9),
      "-": () => this.stage.zoom(1 / 0.9),
    };
    if (tagName !== "BUTTON") actions[" "] = () => $("play").click();
    if (tagName !== "INPUT" || type !== "range") {
      if (type !== "radio") {
        Object.assign(actions, {
          ArrowLeft: () => this.stage.turn(-0.12, 0),
          ArrowRight: () => this.stage.turn(0.12, 0),
          ArrowUp: () => this.stage.turn(0, -0.1),
          ArrowDown: () => this.stage.turn(0, 0.1),
        });
      }
    }
    const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  }
}

// Numbers ###########################################################################

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const mix = (a, b, t) => Float64Array.from(a, (value, i) => value + t * (b[i] - value));
const gaussian = () =>
  Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
const trim = (value) => String(Number(value.toPrecision(2)));

function sigmas(value) {
  const rounded = value.toFixed(1);
  if (Number(rounded) === 0) return "0";
  return `${value < 0 ? "−" : "+"}${rounded.replace("-", "")} σ`;
}

// Colours the track of a slider from one value to another.
function fill(input, from, to) {
  const at = (value) => {
    const share = (value - input.min) / (input.max - input.min);
    return `${100 * Math.min(Math.max(share, 0), 1)}%`;
  };
  input.style.setProperty("--low", at(Math.min(from, to)));
  input.style.setProperty("--high", at(Math.max(from, to)));
}

// Start #############################################################################

try {
  const model = await readPayload($("model").textContent, $("arrays").textContent);
  window.viewer = new Viewer(model, await createDecoder(model.plan, wasm));
} catch (error) {
  $("message").hidden = false;
  $("message").textContent =
    `This page needs WebGL 2 and WebAssembly with SIMD, which browsers have since 2023. (${error})`;
  throw error;
}
