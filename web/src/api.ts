// Every request of the page. Stored arrays are kept once asked for; live answers can be cancelled.

import type { Images, NamedArray, Numbers, Study, Summary } from "./types";

export type Chosen = { image?: string | number; layer?: number; head?: number };

/** A refusal or failure, with the server's sentence. */
export class Refusal extends Error {
  constructor(
    sentence: string,
    readonly status: number,
  ) {
    super(sentence);
  }
}

const KEPT = 160;
const kept = new Map<string, Promise<unknown>>();

function once<T>(key: string, ask: () => Promise<T>): Promise<T> {
  const known = kept.get(key) as Promise<T> | undefined;
  if (known) {
    kept.delete(key);
    kept.set(key, known);
    return known;
  }
  const asked = ask();
  kept.set(key, asked);
  asked.catch(() => kept.delete(key));
  for (const oldest of kept.keys()) {
    if (kept.size <= KEPT) break;
    kept.delete(oldest);
  }
  return asked;
}

async function ask(path: string, init?: RequestInit): Promise<Response> {
  let answer: Response;
  try {
    answer = await fetch(path, init);
  } catch (failure) {
    if (failure instanceof DOMException && failure.name === "AbortError") throw failure;
    throw new Refusal("The server does not answer. Is `vitrail open` still running?", 0);
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Refusal(told?.error ?? `The server answered ${answer.status}.`, answer.status);
}

const KINDS = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array } as const;

async function named(answer: Response): Promise<NamedArray> {
  const told = (name: string) => answer.headers.get(name) ?? "";
  const list = (name: string) => told(name).split(",").filter(Boolean);
  const kind = KINDS[told("X-Dtype") as keyof typeof KINDS];
  const values: Numbers = new kind(await answer.arrayBuffer());
  return { dims: list("X-Dims"), shape: list("X-Shape").map(Number), values };
}

function query(chosen: Record<string, string | number | undefined>): string {
  const given = Object.entries(chosen).filter((entry) => entry[1] !== undefined);
  return given.length ? "?" + new URLSearchParams(given.map(([key, value]) => [key, String(value)])) : "";
}

export const study = (): Promise<Study> => once("study", async () => (await ask("/api/study")).json());

export const ids = (): Promise<string[]> => once("ids", async () => (await (await ask("/api/images")).json()).ids);

/** A stored array, with image, layer or head fixed; `image` may name an upload. */
export function array(name: string, chosen: Chosen = {}): Promise<NamedArray> {
  const path = `/api/array/${name}${query(chosen)}`;
  return once(path, async () => named(await ask(path)));
}

export interface SummaryAsk {
  layer?: number;
  head?: number;
  over?: "head";
  /** A name for the set, and its images; all images if absent. */
  set?: { key: string; images: Int32Array };
}

/** The images of a set as they are sent; written once, as every view asks about the same set. */
const sent = new WeakMap<Int32Array, string>();
function listed(images: Int32Array): string {
  const text = sent.get(images) ?? JSON.stringify({ images: [...images] });
  sent.set(images, text);
  return text;
}

/** Mean with interval and quantiles over all images, or over a set of them. */
export function summary(name: string, { set, ...chosen }: SummaryAsk = {}): Promise<Summary> {
  const path = `/api/summary/${name}${query(chosen)}`;
  const body = set && listed(set.images);
  return once(path + (set ? ` ${set.key}` : ""), async () => {
    const answer = await ask(path, body ? { method: "POST", body } : undefined);
    const told = (header: string) => answer.headers.get(header) ?? "";
    const counts = { n_images: Number(told("X-Images")), quantiles_of: Number(told("X-Quantiles-Of")) };
    return { ...(await named(answer)), ...counts, interval: told("X-Interval") };
  });
}

/** Labels, predictions and the map of all images. */
export async function images(about: Study): Promise<Images> {
  const classifies = "prediction" in about.measures;
  const [label, prediction, probability, xy] = await Promise.all([
    array("label"),
    classifies ? array("prediction") : null,
    "probability" in about.measures ? array("probability") : null,
    about.has_map ? array("image_xy") : null,
  ]);
  return {
    n: label.values.length,
    label: label.values as Int32Array,
    prediction: (prediction?.values as Int32Array) ?? null,
    probability: (probability?.values as Float32Array) ?? null,
    xy: (xy?.values as Float32Array) ?? null,
  };
}

async function live(path: string, signal: AbortSignal): Promise<NamedArray> {
  const known = kept.get(path) as Promise<NamedArray> | undefined;
  if (known) return known;
  const found = await named(await ask(path, { signal }));
  return once(path, async () => found);
}

/** Attention of one head in one image, [query, key], from the live model. */
export const attention = (image: string, layer: number, head: number, signal: AbortSignal): Promise<NamedArray> =>
  live(`/api/live/attention/${image}${query({ layer, head })}`, signal);

/** Class probabilities in the six region modes, [mode, class], from the live model. */
export const modes = (image: string, layer: number, head: number, signal: AbortSignal): Promise<NamedArray> =>
  live(`/api/live/modes/${image}${query({ layer, head })}`, signal);

/** Every measure of a photograph of the visitor's own; answers the name under which the server holds it. */
export async function look(photograph: Blob, signal: AbortSignal): Promise<string> {
  const answer = await ask("/api/live/look", { method: "POST", body: photograph, signal });
  return (await answer.json()).image;
}

export const thumbnail = (image: string | number): string => `/thumb/${image}`;
export const photograph = (image: string | number): string => `/photo/${image}`;

/** Whether the photograph can be shown; throws the server's sentence if not. */
export async function photographAt(image: string, signal: AbortSignal): Promise<string> {
  const path = photograph(image);
  return once(path, async () => URL.createObjectURL(await (await ask(path, { signal })).blob()));
}
