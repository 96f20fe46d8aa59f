import { expect, test } from "vitest";

import * as dots from "../src/dots";
import { Gesture, wheelFactor } from "../src/gestures";

const SIZE = { width: 300, height: 200 };
const xy = Float32Array.from([0, 0, 10, 0, 10, 10, 0, 10, 5, 5]);
const whole = dots.place(dots.bounds(xy), SIZE.width, SIZE.height, dots.WHOLE);

test("the whole map lies in the middle, stretched at most to twice its shape", () => {
  expect(dots.onto(whole, 5, 5)).toEqual([150, 100]);
  expect(whole.ax / whole.ay).toBeCloseTo(276 / 176);
  expect(dots.onto(whole, 0, 10)).toEqual([12, 188]);
  const wide = dots.place([0, 10, 0, 10], 900, 100, dots.WHOLE);
  expect(wide.ax / wide.ay).toBeCloseTo(2);
  expect(dots.place([3, 3, 3, 3], 300, 200, dots.WHOLE).bx).toBeTypeOf("number");
});

test("magnified about a point, that point stays where it is", () => {
  const [px, py] = [60, 150];
  const before = dots.back(whole, px, py);
  const view = dots.zoomed(dots.WHOLE, 3, [px / SIZE.width, py / SIZE.height], 50);
  const to = dots.place(dots.bounds(xy), SIZE.width, SIZE.height, view);
  expect(view.k).toBe(3);
  expect(to.ax).toBeCloseTo(3 * whole.ax);
  dots.back(to, px, py).forEach((value, axis) => expect(value).toBeCloseTo(before[axis]!));
  expect(dots.zoomed(view, 99, [0.5, 0.5], 50).k).toBe(50);
  expect(dots.zoomed(view, 0.01, [0.9, 0.9], 50)).toEqual(dots.WHOLE);
});

test("a drag moves the map with the pointer and never off it", () => {
  const view = dots.zoomed(dots.WHOLE, 4, [0.5, 0.5], 50);
  const moved = dots.place(dots.bounds(xy), SIZE.width, SIZE.height, dots.panned(view, 30 / 300, -10 / 200));
  const at = dots.onto(moved, 5, 5);
  expect(at[0]).toBeCloseTo(180);
  expect(at[1]).toBeCloseTo(90);
  expect(dots.panned(view, 99, -99)).toEqual({ k: 4, x: 0.125, y: 0.875 });
  expect(dots.panned(dots.WHOLE, 0.3, 0.3)).toEqual(dots.WHOLE);
});

test("the nearest dot is found within reach, and what is in sight is told", () => {
  expect(dots.nearest(xy, whole, 152, 98, 12)).toBe(4);
  expect(dots.nearest(xy, whole, 152, 60, 12)).toBe(undefined);
  const close = dots.place(dots.bounds(xy), SIZE.width, SIZE.height, dots.zoomed(dots.WHOLE, 4, [0, 0], 50));
  expect([...dots.inSight(xy, close, SIZE.width, SIZE.height)]).toEqual([0]);
  expect([...dots.inSight(Float32Array.from([NaN, 1, 5, 5]), whole, 300, 200)]).toEqual([1]);
});

test("dots become thumbnails once most in sight have room, the chosen one first", () => {
  const nothing = { k: 1, closest: false };
  const all = Int32Array.from([0, 1, 2, 3, 4]);
  const few = dots.pictures(all, xy, whole, () => 0, nothing)!;
  expect(few.side).toBe(48);
  expect([...few.images].sort()).toEqual([0, 1, 2, 3, 4]);
  const heap = Float32Array.from({ length: 20 }, (_, i) => (i < 4 ? 10 * i : 5 + i / 1e3));
  const to = dots.place(dots.bounds(heap), SIZE.width, SIZE.height, dots.WHOLE);
  const ten = Int32Array.from({ length: 10 }, (_, i) => i);
  expect(dots.pictures(ten, heap, to, () => 0, nothing)).toBe(undefined);
  const closest = dots.pictures(ten, heap, to, (image) => Number(image === 7), { k: 1, closest: true })!;
  expect(closest.images).toContain(7);
  expect(closest.images).toHaveLength(3);
  const crowd = new Int32Array(dots.MOST_THUMBNAILS * 2);
  expect(dots.pictures(crowd, heap, to, () => 0, nothing)).toBe(undefined);
});

test("a dot is painted round its place, and a faint one under the selected", () => {
  const palette: [number, number, number][] = [
    [200, 100, 0],
    [0, 0, 250],
  ];
  const two = { xy: Float32Array.from([10, 8, 10, 8]), to: { ax: 1, bx: 0, ay: 1, by: 0 }, palette, size: 6 };
  const drawn = { ...two, seen: Int32Array.from([0, 1]), colour: Uint8Array.from([1, 0]) };
  const shade = (pixels: dots.Pixels, x: number, y: number) => {
    const p = 4 * ((y + pixels.edge) * pixels.width + x + pixels.edge);
    return [...pixels.data.subarray(p, p + 4)];
  };
  const one = dots.pixelsOf({ ...drawn, seen: Int32Array.from([1]), mask: undefined }, 20, 16, 1);
  expect(shade(one, 9, 7)).toEqual([200, 100, 0, Math.round(0.78 * 255)]);
  expect(shade(one, 10, 8)).toEqual(shade(one, 9, 7));
  expect(shade(one, 14, 8)[3]).toBe(0);
  expect(shade(one, 10, 3)[3]).toBe(0);
  const area = one.data.reduce((sum, value, at) => (at % 4 === 3 ? sum + value : sum), 0) / (0.78 * 255);
  expect(area).toBeGreaterThan(0.9 * Math.PI * 9);
  expect(area).toBeLessThan(1.1 * Math.PI * 9);
  const [red, , blue] = shade(dots.pixelsOf({ ...drawn, mask: Uint8Array.from([0, 1]) }, 20, 16, 1), 9, 7);
  expect(red).toBeGreaterThan(190);
  expect(blue).toBeLessThan(10);
  const edge = dots.pixelsOf({ ...drawn, xy: Float32Array.from([0, 0, 20, 16]), mask: undefined }, 20, 16, 2);
  expect(edge.data.some((value) => value > 0)).toBe(true);
});

test("a stroke draws, a drag with the hand moves, and two pointers magnify", () => {
  const gesture = new Gesture();
  gesture.start(1, [10, 10], false);
  for (const at of [
    [30, 10],
    [30, 40],
    [10, 40],
  ] as [number, number][])
    expect(gesture.move(1, at, false, dots.WHOLE, 50, SIZE)).toBe(dots.WHOLE);
  expect(gesture.end(1)).toEqual({
    outline: [
      [10, 10],
      [30, 10],
      [30, 40],
      [10, 40],
    ],
  });
  gesture.start(1, [10, 10], false);
  expect(gesture.end(1)).toEqual({ click: [10, 10] });
  const near = dots.zoomed(dots.WHOLE, 2, [0.5, 0.5], 50);
  gesture.start(1, [10, 10], true);
  expect(gesture.move(1, [40, 30], false, near, 50, SIZE)).toEqual(dots.panned(near, 0.1, 0.1));
  expect(gesture.end(1)).toBe(undefined);
  gesture.start(1, [100, 100], false);
  gesture.start(2, [200, 100], false);
  const pinched = gesture.move(2, [300, 100], false, dots.WHOLE, 50, SIZE);
  expect(pinched.k).toBeCloseTo(2);
  expect(gesture.end(1)).toBe(undefined);
  expect(gesture.end(2)).toBe(undefined);
  expect(gesture.active).toBe(false);
  expect(wheelFactor({ deltaY: -240, deltaMode: 0, ctrlKey: false })).toBeCloseTo(2);
  expect(wheelFactor({ deltaY: 15, deltaMode: 1, ctrlKey: false })).toBeCloseTo(0.5);
});
