// The decoder's inner loops, in AssemblyScript: WebAssembly with vectors of four floats. The rows of
// all features are padded to whole vectors; `vecs` is the number of vectors of a row.

// y[i] = add[i] + scale * sum_j weight[j] * x[col[j]] - sub[i], with j from rowptr[i] to
// rowptr[i + 1]. `add` and `sub` may be null.
export function gather(
  rowptr: usize, col: usize, weight: usize, x: usize, y: usize, n: i32, vecs: i32,
  scale: f32, add: usize, sub: usize,
): void {
  const stride: usize = <usize>vecs << 4;
  const s = f32x4.splat(scale);
  for (let i: i32 = 0; i < n; i++) {
    const begin = load<i32>(rowptr + (<usize>i << 2));
    const end = load<i32>(rowptr + (<usize>(i + 1) << 2));
    const row = <usize>i * stride;
    let v: usize = 0;
    for (; v + 64 <= stride; v += 64) {
      let a = f32x4.splat(0), b = a, c = a, d = a;
      for (let j = begin; j < end; j++) {
        const w = v128.load32_splat(weight + (<usize>j << 2));
        const p = x + <usize>load<i32>(col + (<usize>j << 2)) * stride + v;
        a = f32x4.add(a, f32x4.mul(w, v128.load(p)));
        b = f32x4.add(b, f32x4.mul(w, v128.load(p, 16)));
        c = f32x4.add(c, f32x4.mul(w, v128.load(p, 32)));
        d = f32x4.add(d, f32x4.mul(w, v128.load(p, 48)));
      }
      store4(y, row + v, a, s, add, sub);
      store4(y, row + v + 16, b, s, add, sub);
      store4(y, row + v + 32, c, s, add, sub);
      store4(y, row + v + 48, d, s, add, sub);
    }
    for (; v < stride; v += 16) {
      let a = f32x4.splat(0);
      for (let j = begin; j < end; j++) {
        const w = v128.load32_splat(weight + (<usize>j << 2));
        const p = x + <usize>load<i32>(col + (<usize>j << 2)) * stride + v;
        a = f32x4.add(a, f32x4.mul(w, v128.load(p)));
      }
      store4(y, row + v, a, s, add, sub);
    }
  }
}

// @ts-ignore: decorator
@inline
function store4(y: usize, at: usize, sum: v128, scale: v128, add: usize, sub: usize): void {
  sum = f32x4.mul(sum, scale);
  if (add) sum = f32x4.add(sum, v128.load(add + at));
  if (sub) sum = f32x4.sub(sum, v128.load(sub + at));
  v128.store(y + at, sum);
}

// y[i] = start + row(i) @ weight, where rows[i] is the address of a row of `width` floats; start is
// the bias, or y[i] itself where bias is null. n is a multiple of four.
export function dense(
  rows: usize, width: i32, weight: usize, bias: usize, y: usize, n: i32, vecs: i32,
): void {
  const stride: usize = <usize>vecs << 4;
  const length: usize = <usize>width << 2;
  for (let i: i32 = 0; i < n; i += 4) {
    const at = rows + (<usize>i << 2);
    const p = load<usize>(at), q = load<usize>(at, 4), r = load<usize>(at, 8), s = load<usize>(at, 12);
    const out = y + <usize>i * stride;
    let v: usize = 0;
    for (; v + 32 <= stride; v += 32) {
      let a0: v128, a1: v128, b0: v128, b1: v128, c0: v128, c1: v128, d0: v128, d1: v128;
      const o = out + v;
      if (bias) {
        a0 = b0 = c0 = d0 = v128.load(bias + v);
        a1 = b1 = c1 = d1 = v128.load(bias + v, 16);
      } else {
        a0 = v128.load(o); a1 = v128.load(o, 16);
        b0 = v128.load(o + stride); b1 = v128.load(o + stride, 16);
        c0 = v128.load(o + 2 * stride); c1 = v128.load(o + 2 * stride, 16);
        d0 = v128.load(o + 3 * stride); d1 = v128.load(o + 3 * stride, 16);
      }
      let w = weight + v;
      for (let f: usize = 0; f < length; f += 4) {
        const w0 = v128.load(w), w1 = v128.load(w, 16);
        let t = v128.load32_splat(p + f);
        a0 = f32x4.add(a0, f32x4.mul(t, w0));
        a1 = f32x4.add(a1, f32x4.mul(t, w1));
        t = v128.load32_splat(q + f);
        b0 = f32x4.add(b0, f32x4.mul(t, w0));
        b1 = f32x4.add(b1, f32x4.mul(t, w1));
        t = v128.load32_splat(r + f);
        c0 = f32x4.add(c0, f32x4.mul(t, w0));
        c1 = f32x4.add(c1, f32x4.mul(t, w1));
        t = v128.load32_splat(s + f);
        d0 = f32x4.add(d0, f32x4.mul(t, w0));
        d1 = f32x4.add(d1, f32x4.mul(t, w1));
        w += stride;
      }
      v128.store(o, a0); v128.store(o, a1, 16);
      v128.store(o + stride, b0); v128.store(o + stride, b1, 16);
      v128.store(o + 2 * stride, c0); v128.store(o + 2 * stride, c1, 16);
      v128.store(o + 3 * stride, d0); v128.store(o + 3 * stride, d1, 16);
    }
    for (; v < stride; v += 16) {
      let a: v128, b: v128, c: v128, d: v128;
      const o = out + v;
      if (bias) {
        a = b = c = d = v128.load(bias + v);
      } else {
        a = v128.load(o);
        b = v128.load(o + stride);
        c = v128.load(o + 2 * stride);
        d = v128.load(o + 3 * stride);
      }
      let w = weight + v;
      for (let f: usize = 0; f < length; f += 4) {
        const t = v128.load(w);
        a = f32x4.add(a, f32x4.mul(v128.load32_splat(p + f), t));
        b = f32x4.add(b, f32x4.mul(v128.load32_splat(q + f), t));
        c = f32x4.add(c, f32x4.mul(v128.load32_splat(r + f), t));
        d = f32x4.add(d, f32x4.mul(v128.load32_splat(s + f), t));
        w += stride;
      }
      v128.store(o, a);
      v128.store(o + stride, b);
      v128.store(o + 2 * stride, c);
      v128.store(o + 3 * stride, d);
    }
  }
}

// y = scale * y + shift, of `count` floats.
export function affine(y: usize, scale: usize, shift: usize, count: i32): void {
  for (let at: usize = 0; at < <usize>count << 2; at += 16) {
    const x = f32x4.mul(v128.load(y + at), v128.load(scale + at));
    v128.store(y + at, f32x4.add(x, v128.load(shift + at)));
  }
}

// y = y + x, of `count` floats.
export function add(y: usize, x: usize, count: i32): void {
  for (let at: usize = 0; at < <usize>count << 2; at += 16) {
    v128.store(y + at, f32x4.add(v128.load(y + at), v128.load(x + at)));
  }
}

export function relu(y: usize, count: i32): void {
  const zero = f32x4.splat(0);
  for (let at: usize = 0; at < <usize>count << 2; at += 16) {
    v128.store(y + at, f32x4.max(v128.load(y + at), zero));
  }
}

// max(y, 0) + exp(min(y, 0)) - 1.
export function elu(y: usize, count: i32): void {
  const zero = f32x4.splat(0), one = f32x4.splat(1);
  for (let at: usize = 0; at < <usize>count << 2; at += 16) {
    const x = v128.load(y + at);
    const power = exp4(f32x4.min(x, zero));
    v128.store(y + at, f32x4.add(f32x4.max(x, zero), f32x4.sub(power, one)));
  }
}

// y / (1 + exp(-y)).
export function silu(y: usize, count: i32): void {
  const one = f32x4.splat(1);
  for (let at: usize = 0; at < <usize>count << 2; at += 16) {
    const x = v128.load(y + at);
    v128.store(y + at, f32x4.div(x, f32x4.add(one, exp4(f32x4.neg(x)))));
  }
}

// The exponential, of -80 to 80: 2^n times its Taylor series to the seventh power on
// [-ln 2 / 2, ln 2 / 2].
// @ts-ignore: decorator
@inline
function exp4(x: v128): v128 {
  const one = f32x4.splat(1);
  const t = f32x4.max(f32x4.min(x, f32x4.splat(80)), f32x4.splat(-80));
  const n = f32x4.nearest(f32x4.mul(t, f32x4.splat(1.44269504)));
  const r = f32x4.sub(
    f32x4.sub(t, f32x4.mul(n, f32x4.splat(0.693359375))),
    f32x4.mul(n, f32x4.splat(-2.12194440e-4)),
  );
  let p = f32x4.splat(1.0 / 5040.0);
  p = f32x4.add(f32x4.mul(p, r), f32x4.splat(1.0 / 720.0));
  p = f32x4.add(f32x4.mul(p, r), f32x4.splat(1.0 / 120.0));
  p = f32x4.add(f32x4.mul(p, r), f32x4.splat(1.0 / 24.0));
  p = f32x4.add(f32x4.mul(p, r), f32x4.splat(1.0 / 6.0));
  p = f32x4.add(f32x4.mul(p, r), f32x4.splat(0.5));
  p = f32x4.add(f32x4.mul(p, r), one);
  p = f32x4.add(f32x4.mul(p, r), one);
  // Adding n to the exponent multiplies by 2^n.
  return i32x4.add(p, i32x4.shl(i32x4.trunc_sat_f32x4_s(n), 23));
}
