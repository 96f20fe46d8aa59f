// The brush: which images are selected, as a text that fits in the URL.
//
//   lasso:x,y,x,y,...      dots of the map inside a polygon; with the map's name before it where it is not the first
//   wrong, right           by the prediction
//   label:12               by class                                find:macaw       label or id contains a text
//   drop:L0H4:0.1          head whose removal costs more           between:strength_entropy:L3H7:2.1:2.2
//
// Parts are joined by "~" and all must hold.

import { polygonContains } from "d3-polygon";

import { array, ids, imageMap } from "./api";
import { number } from "./format";
import type { Images, Selection, Study } from "./types";

export interface Part {
  kind: string;
  rest: string;
}

export const parts = (brush: string): Part[] =>
  brush
    .split("~")
    .filter(Boolean)
    .map((text) => {
      const colon = text.indexOf(":");
      return colon < 0 ? { kind: text, rest: "" } : { kind: text.slice(0, colon), rest: text.slice(colon + 1) };
    });

const joined = (list: Part[]): string => list.map(({ kind, rest }) => (rest ? `${kind}:${rest}` : kind)).join("~");

/** The brush with its part of this kind replaced; `rest` undefined takes it out. "wrong" and "right" exclude each other. */
export function withPart(brush: string, kind: string, rest: string | undefined): string {
  const opposite: Record<string, string> = { wrong: "right", right: "wrong" };
  const others = parts(brush).filter((part) => part.kind !== kind && part.kind !== opposite[kind]);
  return joined(rest === undefined ? others : [...others, { kind, rest: rest.replaceAll("~", " ") }]);
}

export const partOf = (brush: string, kind: string): Part | undefined =>
  parts(brush).find((part) => part.kind === kind);

export function everything(n: number): Selection {
  return {
    key: "",
    all: true,
    mask: new Uint8Array(n).fill(1),
    indices: Int32Array.from({ length: n }, (_, index) => index),
  };
}

/** The images that every part of the brush holds. Throws a sentence for a part that cannot be understood. */
export async function selected(brush: string, images: Images, about: Study): Promise<Selection> {
  if (!brush) return everything(images.n);
  const tests = await Promise.all(parts(brush).map((part) => tested(part, images, about)));
  const mask = new Uint8Array(images.n);
  const indices: number[] = [];
  for (let image = 0; image < images.n; image++) {
    if (tests.every((test) => test(image))) {
      mask[image] = 1;
      indices.push(image);
    }
  }
  return { key: brush, all: false, mask, indices: Int32Array.from(indices) };
}

type Test = (image: number) => boolean;

async function tested({ kind, rest }: Part, images: Images, about: Study): Promise<Test> {
  const { label, prediction, probability } = images;
  if (kind === "lasso" && about.maps.length) {
    const { layout, points } = lasso(rest, about);
    if (about.maps.some(({ name }) => name === layout)) return inside(points, await imageMap(layout));
  }
  if (kind === "wrong" && prediction) return (image) => prediction[image] !== label[image];
  if (kind === "right" && prediction) return (image) => prediction[image] === label[image];
  if (kind === "label") return (image) => label[image] === Number(rest);
  if (kind === "find") return found(rest, label, about);
  const [, name, layer, head, bounds] = /^(?:(\w+):)?L(\d+)H(\d+):(.+)$/.exec(rest) ?? [];
  if (kind === "drop" && bounds && probability) {
    const { values } = await array("head_probability", { layer: Number(layer), head: Number(head) });
    return (image) => probability[image]! - values[image]! > Number(bounds);
  }
  if (kind === "between" && name && bounds) {
    const { values } = await array(name, { layer: Number(layer), head: Number(head) });
    const [low, high] = bounds.split(":").map(Number);
    return (image) => values[image]! >= low! && values[image]! <= high!;
  }
  throw new Error(`The selection "${kind}${rest && ":" + rest}" means nothing in this study. Clear the selection.`);
}

/** Corners of an outline that are kept in the address. */
const MOST_CORNERS = 60;

/** An outline drawn on a map, in the map's units, as the rest of its part of the brush. */
export function lassoPart(points: [number, number][], layout: string, about: Study): string {
  const every = Math.ceil(points.length / MOST_CORNERS);
  const corners = points.filter((_, i) => i % every === 0).flat();
  const on = layout === about.maps[0]?.name ? [] : [layout];
  return [...on, ...corners.map((value) => Number(value.toPrecision(4)))].join(",");
}

/** The outline that the brush has on this map. */
export function lassoOf(brush: string, layout: string, about: Study): [number, number][] {
  const drawn = lasso(partOf(brush, "lasso")?.rest ?? "", about);
  return drawn.layout === layout ? drawn.points : [];
}

function lasso(rest: string, about: Study): { layout: string; points: [number, number][] } {
  const words = rest.split(",");
  const named = /^[a-z]/.test(rest);
  const given = words.slice(named ? 1 : 0).map(Number);
  return {
    layout: named ? words[0]! : (about.maps[0]?.name ?? ""),
    points: Array.from({ length: given.length >> 1 }, (_, i) => [given[2 * i]!, given[2 * i + 1]!]),
  };
}

function inside(polygon: [number, number][], xy: Float32Array): Test {
  const [xs, ys] = [polygon.map((point) => point[0]), polygon.map((point) => point[1])];
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  return (image) => {
    const [x, y] = [xy[2 * image]!, xy[2 * image + 1]!];
    return x >= left && x <= right && y >= top && y <= bottom && polygonContains(polygon, [x, y]);
  };
}

async function found(text: string, label: Int32Array, about: Study): Promise<Test> {
  const sought = text.trim().toLowerCase();
  const classes = new Set(
    about.class_names.flatMap((name, index) => (name.toLowerCase().includes(sought) ? [index] : [])),
  );
  const names = await ids();
  return (image) => classes.has(label[image]!) || (names[image]?.toLowerCase().includes(sought) ?? false);
}

/** The brush in words, a phrase for each part. */
export function inWords(brush: string, className: (index: number) => string): string[] {
  return parts(brush).map(({ kind, rest }) => {
    const [first, ...more] = rest.split(":");
    if (kind === "lasso") return "drawn on the map";
    if (kind === "wrong") return "predicted wrongly";
    if (kind === "right") return "predicted rightly";
    if (kind === "label") return `class ${className(Number(rest))}`;
    if (kind === "find") return `“${rest}”`;
    if (kind === "drop") return `needs ${first} (loses > ${more[0]})`;
    if (kind === "between")
      return `${first?.replaceAll("_", " ")} of ${more[0]} from ${number(Number(more[1]))} to ${number(Number(more[2]))}`;
    return kind;
  });
}
