// What the pointers over the map do: one draws a stroke, a drag moves the map, two move and magnify it.

import { panned, zoomed, type View } from "./dots";

type Point = [number, number];

/** A wheel's notch, in the pixels that browsers give for it, doubles this often. */
const DOUBLING_PX = 240;
/** A pinch of a touchpad comes as a wheel with Ctrl, in steps about this much finer. */
const PINCH = 6;
const LINE_PX = 16;
/** A pointer that moved no further than this has clicked. */
const CLICK_PX = 5;

const distance = (a: Point, b: Point) => Math.hypot(a[0] - b[0], a[1] - b[1]);
const between = (a: Point, b: Point): Point => [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];

/** By how much a turn of the wheel magnifies. */
export function wheelFactor({ deltaY, deltaMode, ctrlKey }: Pick<WheelEvent, "deltaY" | "deltaMode" | "ctrlKey">) {
  return 2 ** ((-deltaY * (deltaMode === 0 ? 1 : LINE_PX) * (ctrlKey ? PINCH : 1)) / DOUBLING_PX);
}

export interface Size {
  width: number;
  height: number;
}

/** The pointers that are down on the map. */
export class Gesture {
  #down = new Map<number, Point>();
  #drags = false;
  #corner: Point | undefined;
  /** The outline that is being drawn. */
  stroke: Point[] = [];

  get active(): boolean {
    return this.#down.size > 0;
  }

  /** A pointer goes down; `drags` if it moves the map and draws nothing. */
  start(id: number, at: Point, drags: boolean): void {
    this.#down.set(id, at);
    this.#drags = drags || this.#down.size > 1;
    this.#corner = this.#drags ? undefined : at;
    this.stroke = [];
  }

  /** A pointer that is down moves; `square` draws a rectangle from where it began. */
  move(id: number, at: Point, square: boolean, view: View, most: number, { width, height }: Size): View {
    const before = this.#down.get(id);
    if (!before) return view;
    const other = [...this.#down].find(([each]) => each !== id)?.[1];
    this.#down.set(id, at);
    if (other) {
      const [was, is] = [between(before, other), between(at, other)];
      const factor = distance(at, other) / Math.max(1, distance(before, other));
      const moved = panned(view, (is[0] - was[0]) / width, (is[1] - was[1]) / height);
      return zoomed(moved, factor, [is[0] / width, is[1] / height], most);
    }
    if (this.#drags) return panned(view, (at[0] - before[0]) / width, (at[1] - before[1]) / height);
    if (this.#corner) this.#draw(this.#corner, at, square);
    return view;
  }

  #draw(corner: Point, at: Point, square: boolean): void {
    if (square) this.stroke = [corner, [at[0], corner[1]], at, [corner[0], at[1]]];
    else if (distance(this.stroke.at(-1) ?? corner, at) > CLICK_PX)
      this.stroke = [...(this.stroke.length ? this.stroke : [corner]), at];
  }

  /** A pointer goes up; answers the outline that was drawn, where it clicked, or nothing. */
  end(id: number): { outline: Point[] } | { click: Point } | undefined {
    this.#down.delete(id);
    const [corner, outline] = [this.#corner, this.stroke];
    this.#corner = undefined;
    this.stroke = [];
    if (!corner) return undefined;
    return outline.length < 3 ? { click: corner } : { outline };
  }

  /** The browser took the pointer for itself. */
  cancel(id: number): void {
    this.end(id);
  }
}
