// What the colours of view A stand for: groups with names, or a scale cut into steps.

import { array } from "./api";
import { className, number } from "./format";
import { colours, GROUPS, OTHERS } from "./palette";
import { headMetrics } from "./state.svelte";
import type { Images, Study } from "./types";

export interface Colouring {
  /** For each image an index into `palette`. */
  index: Uint8Array;
  palette: string[];
  /** What each colour means, in the order of the legend. */
  legend: { colour: string; words: string }[];
  /** The values, for continuous colourings. */
  values?: ArrayLike<number>;
}

export const choices = (about: Study): { name: string; words: string }[] => [
  ...("prediction" in about.measures ? [{ name: "correctness", words: "right or wrong" }, { name: "prediction", words: "prediction" }] : []),
  { name: "label", words: "class" },
  ...("probability" in about.measures ? [{ name: "probability", words: "probability" }] : []),
  ...headMetrics(about).map((name) => ({ name, words: `${about.measures[name]!.title} (chosen head)` })),
];

const STEPS = 24;

export async function colouring(name: string, layer: number, head: number, images: Images, about: Study, dark: boolean): Promise<Colouring> {
  const { label, prediction, probability } = images;
  if (name === "correctness" && prediction) {
    const index = Uint8Array.from(label, (value, i) => (prediction[i] === value ? 0 : 1));
    const palette = [GROUPS[4]!, GROUPS[5]!];
    return { index, palette, legend: [{ colour: palette[0]!, words: "right" }, { colour: palette[1]!, words: "wrong" }] };
  }
  if (name === "label" || (name === "prediction" && prediction)) return grouped(name === "label" ? label : prediction!, about);
  if (name === "probability" && probability) return stepped(probability, dark);
  if (name in about.measures) return stepped((await array(name, { layer, head })).values, dark);
  return grouped(label, about);
}

function grouped(values: Int32Array, about: Study): Colouring {
  const counts = new Map<number, number>();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  const common = [...counts.entries()].sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([value]) => value);
  const own = common.slice(0, common.length > GROUPS.length ? GROUPS.length - 1 : GROUPS.length).sort((a, b) => a - b);
  const others = common.length - own.length;
  const legend = own.map((value, i) => ({ colour: GROUPS[i]!, words: className(about.class_names, value) }));
  if (others) legend.push({ colour: OTHERS, words: `${others} further classes` });
  const place = new Map(own.map((value, i) => [value, i]));
  return { index: Uint8Array.from(values, (value) => place.get(value) ?? own.length), palette: [...GROUPS.slice(0, own.length), OTHERS], legend };
}

function stepped(values: ArrayLike<number>, dark: boolean): Colouring {
  const scale = colours(values, dark);
  const domain = scale.domain();
  const [low, high] = [domain[0]!, domain.at(-1)!];
  const at = (step: number) => low + ((high - low) * (step + 0.5)) / STEPS;
  const palette = Array.from({ length: STEPS }, (_, step) => scale(at(step)));
  const index = Uint8Array.from(values, (value) => Math.max(0, Math.min(STEPS - 1, Math.floor(((value - low) / (high - low)) * STEPS))));
  const ends = [0, STEPS / 2, STEPS - 1].map((step) => ({ colour: palette[step]!, words: number(step === 0 ? low : step === STEPS - 1 ? high : (low + high) / 2) }));
  return { index, palette, legend: ends, values };
}
