// The map of images on a canvas: pure drawing, fast for 50,000 dots.

import { scaleLinear } from "d3-scale";

import { extent } from "./palette";

export interface Place {
  x: (value: number) => number;
  y: (value: number) => number;
  back: (px: number, py: number) => [number, number];
}

/** Map units to pixels. The axes of the map mean nothing, so one may be stretched, up to twice the other, to fill the view. */
export function place(xy: Float32Array, width: number, height: number): Place {
  const n = xy.length / 2;
  const xs = Float32Array.from({ length: n }, (_, i) => xy[2 * i]!);
  const ys = Float32Array.from({ length: n }, (_, i) => xy[2 * i + 1]!);
  const [[left, right], [top, bottom]] = [extent(xs), extent(ys)];
  const margin = 12;
  const fits = [(width - 2 * margin) / (right - left || 1), (height - 2 * margin) / (bottom - top || 1)] as const;
  const unit = 2 * Math.min(...fits);
  const halfX = ((right - left) * Math.min(unit, fits[0])) / 2;
  const halfY = ((bottom - top) * Math.min(unit, fits[1])) / 2;
  const x = scaleLinear([left, right], [width / 2 - halfX, width / 2 + halfX]);
  const y = scaleLinear([top, bottom], [height / 2 - halfY, height / 2 + halfY]);
  return { x, y, back: (px, py) => [x.invert(px), y.invert(py)] };
}

export const dotSize = (n: number, width: number, height: number, k: number): number =>
  k * Math.max(1.5, Math.min(6.5, 0.42 * Math.sqrt((width * height) / Math.max(1, n)) / k));

/** Draw every dot: those outside the selection first and faint. `colour` gives each image's index into `palette`. */
export function drawDots(
  canvas: CanvasRenderingContext2D,
  xy: Float32Array,
  to: Place,
  colour: Uint8Array,
  palette: string[],
  mask: Uint8Array | undefined,
  size: number,
): void {
  const round = colour.length <= 6000;
  const layers: [boolean, number][] = mask ? [[false, 0.13], [true, 0.9]] : [[true, 0.78]];
  for (const [chosen, alpha] of layers) {
    canvas.globalAlpha = alpha;
    palette.forEach((shade, group) => {
      canvas.fillStyle = shade;
      canvas.beginPath();
      for (let i = 0; i < colour.length; i++) {
        if (colour[i] !== group || (mask && !!mask[i] !== chosen)) continue;
        const [px, py] = [to.x(xy[2 * i]!), to.y(xy[2 * i + 1]!)];
        if (round) {
          canvas.moveTo(px + size / 2, py);
          canvas.arc(px, py, size / 2, 0, 7);
        } else canvas.rect(px - size / 2, py - size / 2, size, size);
      }
      canvas.fill();
    });
  }
  canvas.globalAlpha = 1;
}
