// Pixels with signs as pictures: what a filter or a neuron sees. Pure.

/** Red, green, blue as published: clip(v / greatest, 0, 1), one scale for the three channels. */
export function asColours(pixels: ArrayLike<number>): Uint8ClampedArray {
  const n = pixels.length / 3;
  let top = 0;
  for (let i = 0; i < pixels.length; i++) top = Math.max(top, pixels[i]!);
  const data = new Uint8ClampedArray(4 * n);
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) data[4 * i + c] = top > 0 ? 255 * Math.max(0, pixels[3 * i + c]! / top) : 0;
    data[4 * i + 3] = 255;
  }
  return data;
}

/** The share of pixels whose sums lie below the end of a signed scale: a few outshine all. */
const WITHIN = 0.99;

/** Sums over colours: the hue of weight where positive, of gain where negative, opacity by size; the page shows through. */
export function asSigns(
  pixels: ArrayLike<number>,
  positive: readonly [number, number, number],
  negative: readonly [number, number, number],
): Uint8ClampedArray {
  const n = pixels.length / 3;
  const sums = Float32Array.from({ length: n }, (_, i) => pixels[3 * i]! + pixels[3 * i + 1]! + pixels[3 * i + 2]!);
  const sorted = sums.map(Math.abs).sort();
  const top = sorted[Math.min(n - 1, Math.floor(WITHIN * n))] || sorted[n - 1] || 1;
  const data = new Uint8ClampedArray(4 * n);
  sums.forEach((sum, i) => {
    const hue = sum >= 0 ? positive : negative;
    data.set([...hue, 255 * Math.min(1, Math.abs(sum) / top)], 4 * i);
  });
  return data;
}
