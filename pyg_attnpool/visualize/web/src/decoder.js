// Runs a plan (pyg_attnpool/models/plan.py) in WebAssembly. All memory is laid out when the decoder
// is made; a decode allocates nothing.

const up4 = (n) => (n + 3) & ~3;

export async function createDecoder(plan, wasm) {
  const memory = new WebAssembly.Memory({ initial: 1 });
  const { instance } = await WebAssembly.instantiate(wasm, { env: { memory, abort() {} } });
  return new Decoder(plan, memory, instance.exports);
}

class Decoder {
  constructor(plan, memory, kernels) {
    this.memory = memory;
    this.kernels = kernels;
    this.end = 1024;
    this.zeros = 0;
    this.shared = new Map();
    this.steps = [];
    this.zeros = this.floats(4096); // a row that no spiral fills
    this.code = this.features(1, latentSize(plan)); // a code is one row
    this.out = this.path(plan, this.code);
    this.numVertices = this.out.rows;
    this.channels = this.out.channels;
    this.stride = up4(this.channels);
  }

  // Features [numVertices * stride] of a code; a view that the next decode overwrites.
  decode(code) {
    new Float32Array(this.memory.buffer, this.code.at, this.code.channels).set(code);
    for (const step of this.steps) step();
    const { at, rows } = this.out;
    return new Float32Array(this.memory.buffer, at, rows * this.stride);
  }

  // Memory ###########################################################################

  allocate(bytes) {
    const at = this.end;
    this.end = at + ((bytes + 63) & ~63);
    const missing = this.end - this.memory.buffer.byteLength;
    if (missing > 0) this.memory.grow(Math.ceil(missing / 65536));
    return at;
  }

  floats(count) {
    return this.allocate(4 * count);
  }

  ints(values) {
    const at = this.allocate(4 * values.length);
    new Int32Array(this.memory.buffer, at, values.length).set(values);
    return at;
  }

  store(values) {
    const at = this.floats(values.length);
    new Float32Array(this.memory.buffer, at, values.length).set(values);
    return at;
  }

  // Rows of `channels` floats, padded to whole vectors and to a multiple of four rows.
  padded({ data, shape }) {
    const channels = shape.at(-1);
    const rows = data.length / channels;
    const stride = up4(channels);
    const at = this.floats(up4(rows) * stride);
    const view = new Float32Array(this.memory.buffer, at, rows * stride);
    for (let i = 0; i < rows; i++) {
      view.set(data.subarray(i * channels, (i + 1) * channels), i * stride);
    }
    return at;
  }

  features(rows, channels) {
    return { at: this.floats(up4(rows) * up4(channels)), rows, channels };
  }

  matrix({ rowptr, col, value, shape }) {
    // One matrix may serve several steps.
    if (!this.shared.has(col.data)) {
      this.shared.set(col.data, {
        rowptr: this.ints(rowptr.data),
        col: this.ints(col.data),
        value: this.store(value.data),
        rows: shape[0],
      });
    }
    return this.shared.get(col.data);
  }

  // The addresses of rows, -1 standing for a row of zeros.
  addresses(x, index) {
    const stride = 4 * up4(x.channels);
    const rows = new Int32Array(up4(index.length)).fill(this.zeros);
    index.forEach((row, i) => (rows[i] = row < 0 ? this.zeros : x.at + row * stride));
    return this.ints(rows);
  }

  // Steps ############################################################################

  path(plan, x) {
    for (const step of plan) x = this[step.op](step, x);
    return x;
  }

  gathered(matrix, x, y, scale = 1, add = 0, sub = 0) {
    const { rowptr, col, value, rows } = this.matrix(matrix);
    const vecs = up4(y.channels) / 4;
    this.steps.push(() =>
      this.kernels.gather(rowptr, col, value, x.at, y.at, rows, vecs, scale, add, sub),
    );
    return y;
  }

  dense(rows, width, weight, bias, y) {
    const vecs = up4(y.channels) / 4;
    this.steps.push(() => this.kernels.dense(rows, width, weight, bias, y.at, up4(y.rows), vecs));
  }

  Linear({ weight, bias }, code) {
    // One row of N * F features: the columns of the weight, gathered with the code as weights.
    const [rows, channels, width] = weight.shape;
    const y = this.features(rows, channels);
    const stride = up4(channels);
    const columns = this.floats(width * rows * stride);
    const view = new Float32Array(this.memory.buffer, columns, width * rows * stride);
    for (let i = 0; i < rows * channels; i++) {
      const at = Math.floor(i / channels) * stride + (i % channels);
      for (let d = 0; d < width; d++) view[d * rows * stride + at] = weight.data[i * width + d];
    }
    const first = this.padded(bias);
    const one = this.ints([0, width]);
    const order = this.ints(Int32Array.from({ length: width }, (_, i) => i));
    this.steps.push(() =>
      this.kernels.gather(one, order, code.at, columns, y.at, 1, (rows * stride) / 4, 1, first, 0),
    );
    return y;
  }

  Gather({ matrix }, x) {
    return this.gathered(matrix, x, this.features(matrix.shape[0], x.channels));
  }

  Chebyshev({ laplacian, weight, bias }, x) {
    const [K, width, channels] = weight.shape;
    const parts = split(weight).map((part) => this.padded(part));
    const y = this.features(x.rows, channels);
    const first = this.padded(bias);
    const all = Int32Array.from({ length: x.rows }, (_, i) => i);
    if (channels < width) {
      // Clenshaw's algorithm on the products, which are narrower than the features.
      const rows = this.addresses(x, all);
      const zero = this.padded({ data: new Float32Array(channels), shape: [channels] });
      let next = null;
      let after = null;
      for (let k = K - 1; k >= 0; k--) {
        const product = k > 0 ? this.features(x.rows, channels) : y;
        this.dense(rows, width, parts[k], k > 0 ? zero : first, product);
        if (next) {
          this.gathered(laplacian, next, product, k > 0 ? 2 : 1, product.at, after ? after.at : 0);
        }
        [next, after] = [product, next];
      }
      return y;
    }
    let [before, term] = [null, x];
    for (let k = 0; k < K; k++) {
      if (k > 0) {
        const y = this.features(x.rows, x.channels);
        this.gathered(laplacian, term, y, k > 1 ? 2 : 1, 0, before ? before.at : 0);
        [before, term] = [term, y];
      }
      this.dense(this.addresses(term, all), width, parts[k], k > 0 ? 0 : first, y);
    }
    return y;
  }

  Spiral({ index, weight, bias }, x) {
    const [, width, channels] = weight.shape;
    const [rows, length] = index.shape;
    const y = this.features(rows, channels);
    const first = this.padded(bias);
    split(weight).forEach((part, l) => {
      const step = Int32Array.from({ length: rows }, (_, i) => index.data[i * length + l]);
      this.dense(this.addresses(x, step), width, this.padded(part), l > 0 ? 0 : first, y);
    });
    return y;
  }

  Activation({ function: name }, x) {
    const count = x.rows * up4(x.channels);
    const kernel = this.kernels[name];
    this.steps.push(() => kernel(x.at, count));
    return x;
  }

  Affine({ scale, shift }, x) {
    const [a, b] = [this.padded(scale), this.padded(shift)];
    const count = x.rows * up4(x.channels);
    this.steps.push(() => this.kernels.affine(x.at, a, b, count));
    return x;
  }

  Sum({ paths }, code) {
    const [y, ...others] = paths.map((path) => this.path(path, code));
    const count = y.rows * up4(y.channels);
    for (const x of others) this.steps.push(() => this.kernels.add(y.at, x.at, count));
    return y;
  }
}

function latentSize(plan) {
  const [first] = plan;
  if (first.op === "Sum") return latentSize(first.paths[0]);
  return first.weight.shape[2];
}

// The matrices [F, F'] of weights [K, F, F'].
function split({ data, shape: [K, width, channels] }) {
  const size = width * channels;
  return Array.from({ length: K }, (_, k) => ({
    data: data.subarray(k * size, (k + 1) * size),
    shape: [width, channels],
  }));
}
