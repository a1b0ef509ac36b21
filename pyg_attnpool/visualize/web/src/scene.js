// The mesh in WebGL: soft light, a view that turns, colours per vertex. Frames are drawn only when
// something has changed.
import {
  BufferAttribute,
  BufferGeometry,
  Color,
  DirectionalLight,
  DoubleSide,
  DynamicDrawUsage,
  HemisphereLight,
  Mesh,
  MeshStandardMaterial,
  PerspectiveCamera,
  Scene,
  Vector3,
  WebGLRenderer,
} from "three";
import { OrbitControls } from "three/examples/jsm/controls/OrbitControls.js";

const CLAY = { light: "#dcc8b6", dark: "#d3bfae" };
const AZIMUTH = (20 * Math.PI) / 180; // y is up and z towards the viewer

export class Stage {
  // `margin` gives the height of the stage over that of the mesh.
  constructor(canvas, faces, numVertices, margin) {
    this.canvas = canvas;
    this.margin = margin;
    this.faces = faces;
    this.renderer = new WebGLRenderer({
      canvas,
      antialias: true,
      alpha: true,
      preserveDrawingBuffer: true, // for pictures
    });
    this.scene = new Scene();
    this.camera = new PerspectiveCamera(26, 1, 0.01, 100);
    this.scene.add(this.camera);

    this.sky = new HemisphereLight("#ffffff", "#b8afa5", 1.3);
    this.scene.add(this.sky);
    // The lights hang on the camera, so that the side that is looked at is the lit one.
    for (const [x, y, z, intensity] of [
      [-0.7, 0.9, 0.75, 1.75],
      [1, 0.15, 0.6, 0.75],
      [0.5, 0.7, -1, 0.7],
    ]) {
      const light = new DirectionalLight("#ffffff", intensity);
      light.position.set(x, y, z).multiplyScalar(100);
      this.camera.add(light, light.target);
    }

    this.position = new Float32Array(3 * numVertices);
    this.normal = new Float32Array(3 * numVertices);
    this.color = new Float32Array(3 * numVertices);
    this.geometry = new BufferGeometry();
    this.geometry.setIndex(new BufferAttribute(Uint32Array.from(faces), 1));
    for (const name of ["position", "normal", "color"]) {
      const attribute = new BufferAttribute(this[name], 3).setUsage(DynamicDrawUsage);
      this.geometry.setAttribute(name, attribute);
    }
    this.material = new MeshStandardMaterial({ roughness: 0.72, metalness: 0, side: DoubleSide });
    this.mesh = new Mesh(this.geometry, this.material);
    this.mesh.frustumCulled = false;
    this.scene.add(this.mesh);

    this.controls = new OrbitControls(this.camera, canvas);
    this.controls.enableDamping = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.controls.dampingFactor = 0.12;
    this.controls.addEventListener("change", () => this.redraw());
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement);
  }

  // The whole mesh in view, seen from the front.
  frame() {
    const { position } = this;
    const [low, high] = [new Vector3(1, 1, 1), new Vector3(1, 1, 1)];
    low.multiplyScalar(Infinity);
    high.multiplyScalar(-Infinity);
    const point = new Vector3();
    for (let i = 0; i < position.length; i += 3) {
      point.fromArray(position, i);
      low.min(point);
      high.max(point);
    }
    this.center = low.clone().add(high).multiplyScalar(0.5);
    this.size = high.sub(low);
    this.radius = this.size.length() / 2 || 1;
    this.front();
  }

  front() {
    const { camera, controls, radius, size, center } = this;
    const half = Math.tan((camera.fov * Math.PI) / 360);
    const wide = Math.hypot(size.x * Math.cos(AZIMUTH), size.z * Math.sin(AZIMUTH));
    const distance = (this.margin() * Math.max(size.y, wide / camera.aspect)) / (2 * half) + size.z / 2;
    camera.near = distance / 100;
    camera.far = distance * 100;
    camera.updateProjectionMatrix();
    controls.target.copy(center);
    controls.minDistance = radius * 0.3;
    controls.maxDistance = distance * 6;
    camera.position.set(-Math.sin(AZIMUTH), 0.06, Math.cos(AZIMUTH));
    camera.position.normalize().multiplyScalar(distance).add(center);
    controls.update();
    this.redraw();
  }

  turn(azimuth, polar) {
    const { camera, controls } = this;
    const offset = camera.position.clone().sub(controls.target);
    const radius = offset.length();
    const angle = Math.atan2(offset.x, offset.z) + azimuth;
    const height = Math.min(Math.max(Math.acos(offset.y / radius) + polar, 0.05), Math.PI - 0.05);
    offset.setFromSphericalCoords(radius, height, angle);
    camera.position.copy(controls.target).add(offset);
    controls.update();
    this.redraw();
  }

  zoom(factor) {
    const { camera, controls } = this;
    const offset = camera.position.clone().sub(controls.target).multiplyScalar(factor);
    offset.clampLength(controls.minDistance, controls.maxDistance);
    camera.position.copy(controls.target).add(offset);
    controls.update();
    this.redraw();
  }

  // Call after `position` has been written.
  moved() {
    normals(this.position, this.faces, this.normal);
    this.geometry.attributes.position.needsUpdate = true;
    this.geometry.attributes.normal.needsUpdate = true;
    this.redraw();
  }

  // Call after `color` has been written, linear RGB in [0, 1]; `false` for plain clay.
  coloured(on) {
    if (this.material.vertexColors !== on) {
      this.material.vertexColors = on;
      this.material.needsUpdate = true;
    }
    this.material.color = new Color(on ? "#ffffff" : CLAY[this.theme]);
    this.geometry.attributes.color.needsUpdate = on;
    this.redraw();
  }

  setTheme(theme) {
    this.theme = theme;
    this.sky.groundColor = new Color(theme === "dark" ? "#857c73" : "#b8afa5");
    this.sky.intensity = theme === "dark" ? 1.1 : 1.3;
    this.coloured(this.material.vertexColors);
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas.parentElement;
    if (!width || !height) return;
    this.renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
    this.renderer.setSize(width, height, false);
    this.camera.aspect = width / height;
    this.camera.updateProjectionMatrix();
    this.redraw();
  }

  redraw() {
    if (this.due) return;
    this.due = requestAnimationFrame(() => {
      this.due = null;
      this.draw();
    });
  }

  draw() {
    this.controls.update(); // damping asks for further frames itself
    this.renderer.render(this.scene, this.camera);
  }
}

// Normals of the vertices, those of their faces weighted by area.
function normals(x, faces, out) {
  out.fill(0);
  for (let f = 0; f < faces.length; f += 3) {
    const a = 3 * faces[f];
    const b = 3 * faces[f + 1];
    const c = 3 * faces[f + 2];
    const ux = x[b] - x[a];
    const uy = x[b + 1] - x[a + 1];
    const uz = x[b + 2] - x[a + 2];
    const vx = x[c] - x[a];
    const vy = x[c + 1] - x[a + 1];
    const vz = x[c + 2] - x[a + 2];
    const nx = uy * vz - uz * vy;
    const ny = uz * vx - ux * vz;
    const nz = ux * vy - uy * vx;
    out[a] += nx;
    out[a + 1] += ny;
    out[a + 2] += nz;
    out[b] += nx;
    out[b + 1] += ny;
    out[b + 2] += nz;
    out[c] += nx;
    out[c + 1] += ny;
    out[c + 2] += nz;
  }
  for (let i = 0; i < out.length; i += 3) {
    const [x, y, z] = [out[i], out[i + 1], out[i + 2]];
    const inverse = 1 / (Math.sqrt(x * x + y * y + z * z) || 1);
    out[i] *= inverse;
    out[i + 1] *= inverse;
    out[i + 2] *= inverse;
  }
}
