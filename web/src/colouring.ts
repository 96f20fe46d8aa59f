// What the colours of the images stand for: groups with names, or a scale cut into steps.

import { array } from "./api";
import { className, number } from "./format";
import { colours, GROUPS, OTHERS } from "./palette";
import { headMetrics } from "./metrics";
import type { Images, Measure, Study } from "./types";

export interface Colouring {
  /** For each image an index into `palette`. */
  index: Uint8Array;
  palette: string[];
  /** What each colour means, in the order of the legend. */
  legend: { colour: string; words: string }[];
  /** The values, for continuous colourings. */
  values?: ArrayLike<number>;
}

/** Whether a measure is one number of an image once a layer and head are chosen, and no name of something. */
const isOneNumber = ({ dims, is_quantity }: Measure): boolean =>
  ["image", "image,layer", "image,layer,head"].includes(dims.join()) && is_quantity;

/** What images can be coloured by; "right or wrong" only where the labels are the data set's own. */
export function choices(about: Study): { name: string; words: string }[] {
  const classifies = "prediction" in about.measures;
  const heads = headMetrics(about);
  const list = [
    ...(classifies && about.own_labels ? [{ name: "correctness", words: "right or wrong" }] : []),
    ...(about.own_labels ? [{ name: "label", words: "class" }] : []),
    ...(classifies ? [{ name: "prediction", words: "the model's answer" }] : []),
  ];
  for (const [name, measure] of Object.entries(about.measures)) {
    if (!isOneNumber(measure) || (measure.dims.includes("head") && !heads.includes(name))) continue;
    const chosen = measure.dims.at(-1) === "image" ? "" : ` (chosen ${measure.dims.at(-1)})`;
    list.push({ name, words: measure.title + chosen });
  }
  return list;
}

/** The colouring asked for, or the first that there is. */
export function chosenColour(asked: string, about: Study): string {
  const list = choices(about);
  return list.some(({ name }) => name === asked) ? asked : (list[0]?.name ?? "");
}

const STEPS = 24;

export async function colouring(
  name: string,
  layer: number,
  head: number,
  images: Images,
  about: Study,
  dark: boolean,
): Promise<Colouring> {
  const { label, prediction } = images;
  if (name === "correctness" && prediction) {
    const palette = [GROUPS[4]!, GROUPS[5]!];
    return {
      index: Uint8Array.from(label, (value, i) => (prediction[i] === value ? 0 : 1)),
      palette,
      legend: ["right", "wrong"].map((words, i) => ({ colour: palette[i]!, words })),
    };
  }
  if (name === "label") return grouped(label, about);
  if (name === "prediction" && prediction) return grouped(prediction, about);
  const measure = about.measures[name];
  if (!measure) return { index: new Uint8Array(images.n), palette: [OTHERS], legend: [] };
  const fixed = {
    ...(measure.dims.includes("layer") ? { layer } : {}),
    ...(measure.dims.includes("head") ? { head } : {}),
  };
  return stepped((await array(name, fixed)).values, dark);
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
  return {
    index: Uint8Array.from(values, (value) => place.get(value) ?? own.length),
    palette: [...GROUPS.slice(0, own.length), OTHERS],
    legend,
  };
}

export function stepped(values: ArrayLike<number>, dark: boolean): Colouring {
  const scale = colours(values, dark);
  const domain = scale.domain();
  const [low, high] = [domain[0]!, domain.at(-1)!];
  const at = (step: number) => low + ((high - low) * (step + 0.5)) / STEPS;
  const palette = Array.from({ length: STEPS }, (_, step) => scale(at(step)));
  const index = Uint8Array.from(values, (value) =>
    Number.isNaN(value) ? STEPS : Math.max(0, Math.min(STEPS - 1, Math.floor(((value - low) / (high - low)) * STEPS))),
  );
  const lacks = index.includes(STEPS);
  const ends = [0, STEPS / 2, STEPS - 1].map((step) => ({
    colour: palette[step]!,
    words: number(step === 0 ? low : step === STEPS - 1 ? high : (low + high) / 2),
  }));
  if (lacks) {
    palette.push(OTHERS);
    ends.push({ colour: OTHERS, words: "no value" });
  }
  return { index, palette, legend: ends, values };
}
