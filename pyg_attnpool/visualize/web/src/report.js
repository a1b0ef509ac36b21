// A report: Python has written the text; here the meshes turn, and one of them is chosen.
import { colourise, gradient, roundUp } from "./colours.js";
import { readPayload } from "./payload.js";
import { Stage } from "./scene.js";
import { makeTheme } from "./theme.js";

const $ = (id) => document.getElementById(id);

class Report {
  constructor({ faces, models, meshes, top }) {
    this.models = models;
    this.meshes = meshes;
    this.top = roundUp(top);
    this.mode = "error";
    const [first] = meshes;
    this.numVertices = first.vertices.shape[0];
    this.stages = [{ name: "Truth" }, ...models].map(({ name, color }, i) =>
      this.makeStage(name, color, faces.data, i - 1),
    );
    this.makeTools();
    $("legend").append(scale(this.top, "mm"));
    for (const place of document.querySelectorAll(".scale[data-top]")) {
      place.replaceWith(scale(Number(place.dataset.top), "mm"));
    }
    for (const button of document.querySelectorAll("[data-show]")) {
      button.addEventListener("click", () => {
        this.show(this.meshes.findIndex(({ index }) => index === Number(button.dataset.show)));
        $("maps").scrollIntoView({ block: "start" });
      });
    }
    this.show(0);
    for (const { stage } of this.stages) {
      stage.resize();
      stage.frame();
    }
    this.toggleTheme = makeTheme($("theme"), (theme) => {
      for (const { stage } of this.stages) stage.setTheme(theme);
    });
    addEventListener("keydown", (event) => this.key(event));
  }

  makeStage(name, color, faces, model) {
    const figure = document.createElement("figure");
    const box = document.createElement("div");
    box.className = "stage";
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("aria-label", `${name}. Drag or use the arrow keys to turn it.`);
    box.append(canvas);
    const caption = document.createElement("figcaption");
    const mean = document.createElement("span");
    caption.append(name, mean);
    figure.append(box, caption);
    $("stages").append(figure);
    const stage = new Stage(canvas, faces, this.numVertices, () => 1.12);
    // The wheel and a vertical drag of a finger scroll the page.
    stage.controls.enableZoom = false;
    stage.controls.enablePan = false;
    canvas.style.touchAction = "pan-y";
    stage.controls.addEventListener("change", () => this.follow(stage));
    return { stage, mean, model, values: new Float32Array(this.numVertices) };
  }

  // All meshes are seen from where one is.
  follow(leader) {
    if (this.following) return;
    this.following = true;
    for (const { stage } of this.stages) {
      if (stage === leader) continue;
      stage.controls.target.copy(leader.controls.target);
      stage.camera.position.copy(leader.camera.position);
      stage.controls.update();
      stage.redraw();
    }
    this.following = false;
  }

  makeTools() {
    const select = document.createElement("select");
    select.setAttribute("aria-label", "Mesh");
    select.append(...this.meshes.map(({ name }, i) => new Option(name, i)));
    select.addEventListener("change", () => this.show(Number(select.value)));
    this.select = select;
    const kinds = document.createElement("div");
    kinds.className = "segments";
    kinds.setAttribute("role", "radiogroup");
    kinds.setAttribute("aria-label", "Colour");
    for (const [mode, text] of [["error", "Error"], ["shape", "Shape"]]) {
      const label = document.createElement("label");
      const input = Object.assign(document.createElement("input"), {
        type: "radio",
        name: "mode",
        value: mode,
        checked: mode === this.mode,
      });
      input.addEventListener("change", () => {
        this.mode = mode;
        this.colour();
      });
      label.append(input, Object.assign(document.createElement("span"), { textContent: text }));
      kinds.append(label);
    }
    const zoom = [["+", "Nearer", 0.85], ["−", "Farther", 1 / 0.85]].map(([sign, title, factor]) => {
      const button = Object.assign(document.createElement("button"), {
        className: "icon",
        textContent: sign,
        title,
      });
      button.addEventListener("click", () => this.stages[0].stage.zoom(factor));
      return button;
    });
    $("maps-tools").append(select, kinds, ...zoom);
  }

  show(index) {
    this.index = index;
    this.select.value = index;
    const { vertices, residuals, means } = this.meshes[index];
    for (const { stage, mean, model, values } of this.stages) {
      const truth = vertices.data;
      if (model < 0) {
        stage.position.set(truth);
      } else {
        const away = residuals[model].residual.data;
        for (let i = 0; i < truth.length; i++) stage.position[i] = truth[i] + away[i];
        for (let v = 0; v < values.length; v++) {
          values[v] = 1000 * Math.hypot(away[3 * v], away[3 * v + 1], away[3 * v + 2]);
        }
        mean.textContent = `${means[model].toFixed(2)} mm`;
      }
      stage.moved();
    }
    this.colour();
  }

  colour() {
    $("legend").hidden = this.mode !== "error";
    for (const { stage, model, values } of this.stages) {
      const on = this.mode === "error" && model >= 0;
      if (on) colourise(values, this.top, stage.color);
      stage.coloured(on);
    }
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.stages.find(({ stage }) => stage.canvas === event.target);
    const turns = {
      ArrowLeft: [-0.15, 0],
      ArrowRight: [0.15, 0],
      ArrowUp: [0, -0.15],
      ArrowDown: [0, 0.15],
    };
    if (at && turns[event.key]) {
      at.stage.turn(...turns[event.key]);
      event.preventDefault();
    } else if (event.key.toLowerCase() === "d" && event.target.tagName !== "SELECT") {
      this.toggleTheme();
    }
  }
}

function scale(top, unit) {
  const bar = Object.assign(document.createElement("div"), { className: "scale" });
  const ramp = document.createElement("div");
  ramp.style.background = gradient;
  const ticks = document.createElement("div");
  const text = (value) => String(Number(value.toPrecision(3)));
  for (const tick of ["0", text(top / 2), `${text(top)} ${unit} and more`]) {
    ticks.append(Object.assign(document.createElement("span"), { textContent: tick }));
  }
  bar.append(ramp, ticks);
  return bar;
}

document.querySelector("h1").textContent = document.title;
const block = (id) => $(id).textContent;
window.report = new Report(await readPayload(block("model"), block("arrays")));
