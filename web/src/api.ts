// Every request of the page. Stored arrays are kept once asked for; live answers can be cancelled.

import { Arrivals } from "./arrivals";
import { frameNames, KINDS, readFrames, type Looked } from "./frames";
import { Kept } from "./kept";
import type { Landscape, NamedHead, Patterns } from "./patterns";
import { Gate, OVER_IMAGES, Questions } from "./questions";
import { recordedAnswer, recording } from "./recorded";
import type {
  ComparedImage,
  Comparison,
  Curves,
  ImageMap,
  Images,
  Live,
  NamedArray,
  Numbers,
  Sentence,
  Study,
  Summary,
  WhatIf,
} from "./types";

export type Chosen = { image?: string | number; layer?: number; head?: number; token_channel?: number };

/** A refusal or failure, with the server's sentence. */
export class Refusal extends Error {
  constructor(
    sentence: string,
    readonly status: number,
  ) {
    super(sentence);
  }
}

/** Of answers: some maps of a head of thousands of tokens, which have 40 MB each, or all that a study of a ViT has. */
const ANSWERS_BYTES = 256 * 2 ** 20;
/** Of photographs beside them, so that no map takes the one away that is looked at. */
const PHOTOGRAPHS_BYTES = 64 * 2 ** 20;

const answers = new Kept<unknown>(ANSWERS_BYTES);
const once = <T>(key: string, ask: () => Promise<T>): Promise<T> => answers.once(key, ask);

async function ask(path: string, init?: RequestInit): Promise<Response> {
  let answer: Response;
  try {
    answer = recording ? await recordedAnswer(recording, path, init?.body ?? undefined) : await fetch(path, init);
  } catch (failure) {
    if (failure instanceof DOMException && failure.name === "AbortError") throw failure;
    throw new Refusal("The server does not answer. Is `vitrail open` still running?", 0);
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Refusal(told?.error ?? `The server answered ${answer.status}.`, answer.status);
}

const overImages = new Gate(OVER_IMAGES);

/** The same of what the server computes over all images, which may take it seconds. */
const askOfAll = (path: string, init?: RequestInit): Promise<Response> => overImages.pass(() => ask(path, init));

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

export const study = (): Promise<Study> =>
  once("study", async () => ({ recorded_maps: [], ...(await (await ask("/api/study")).json()) }));

export const live = async (): Promise<Live> => (await ask("/api/live")).json();

export const ids = (): Promise<string[]> => once("ids", async () => (await (await ask("/api/images")).json()).ids);

/** A stored array, with image, layer or head fixed; `image` may name an upload. */
export function array(name: string, chosen: Chosen = {}): Promise<NamedArray> {
  const path = `/api/array/${name}${query(chosen)}`;
  return once(path, async () => {
    await arrived(String(chosen.image ?? ""), name);
    return named(await ask(path));
  });
}

export interface SummaryAsk {
  layer?: number;
  head?: number;
  over?: "head";
  /** Of what each image loses: the measure's baseline less the measure. */
  cost?: 1;
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
    const answer = await askOfAll(path, body ? { method: "POST", body } : undefined);
    const told = (header: string) => answer.headers.get(header) ?? "";
    const counts = { n_images: Number(told("X-Images")), quantiles_of: Number(told("X-Quantiles-Of")) };
    return { ...(await named(answer)), ...counts, interval: told("X-Interval") };
  });
}

/** The analyses that a study says something of. */
export const findings = (): Promise<{ name: string; title: string }[]> =>
  once("findings", async () => (await (await ask("/api/findings")).json()).analyses);

const sentences = (path: string): Promise<Sentence[]> =>
  once(path, async () => (await (await askOfAll(path)).json()).sentences);

/** What a study says of itself, of one analysis. */
export const findingsOf = (analysis: string): Promise<Sentence[]> => sentences(`/api/findings/${analysis}`);

/** Accuracy over the number of heads pruned. */
export const curves = (): Promise<Curves> => once("curves", async () => (await askOfAll("/api/curves")).json());

/** Why a head matters, or not. */
export const why = (layer: number, head: number): Promise<Sentence[]> => sentences(`/api/why${query({ layer, head })}`);

/** What heads look like over all images, by name, and the clusters of their maps. */
export const patterns = (): Promise<Patterns> => once("patterns", async () => (await askOfAll("/api/patterns")).json());

/** What heads look like in one image. */
export const patternsIn = (image: string): Promise<NamedHead[]> =>
  once(`patterns ${image}`, async () => {
    await arrived(image, "pattern_rule");
    return (await (await ask(`/api/patterns/${image}`)).json()).heads;
  });

/** How densely maps of heads lie on the standing map. */
export const landscape = (kind: "patch" | "cls"): Promise<Landscape> =>
  once(`landscape ${kind}`, async () => (await askOfAll(`/api/patterns/map/${kind}`)).json());

/** What differs from another study, counted from 0. */
export const comparison = (other: number): Promise<Comparison> =>
  once(`compare ${other}`, async () => (await askOfAll(`/api/compare/${other}`)).json());

/** A variable of the comparison. */
export const compared = (other: number, variable: string): Promise<NamedArray> =>
  once(`/api/compare/${other}/${variable}`, async () => named(await ask(`/api/compare/${other}/${variable}`)));

/** How far each measure of one image differs. */
export const comparedImage = (other: number, image: string): Promise<ComparedImage> =>
  once(`compare ${other} ${image}`, async () => (await ask(`/api/compare/${other}/image/${image}`)).json());

/** What the other study holds of an image of this one; of one head where it is given. */
export function comparedArray(other: number, image: string, measure: string, head?: number): Promise<NamedArray> {
  const path = `/api/compare/${other}/image/${image}/${measure}${query({ head })}`;
  return once(path, async () => named(await ask(path)));
}

/** Where each image lies on a map. */
export async function imageMap(name: string): Promise<Float32Array> {
  const path = `/api/maps/${name}`;
  return (await once(path, async () => named(await ask(path)))).values as Float32Array;
}

/** Where a photograph of the visitor's own lies on a map, once what places it there is computed. */
export async function ownPlace({ name, table }: ImageMap, image: string): Promise<Float32Array> {
  const path = `/api/maps/${name}${query({ image })}`;
  const place = await once(path, async () => {
    await arriving.get(image)?.of(table);
    return named(await ask(path));
  });
  return place.values as Float32Array;
}

/** Labels and predictions of all images. */
export async function images(about: Study): Promise<Images> {
  const classifies = "prediction" in about.measures;
  const [label, prediction, probability] = await Promise.all([
    array("label"),
    classifies ? array("prediction") : null,
    "probability" in about.measures ? array("probability") : null,
  ]);
  return {
    n: label.values.length,
    label: label.values as Int32Array,
    prediction: (prediction?.values as Int32Array) ?? null,
    probability: (probability?.values as Float32Array) ?? null,
  };
}

const questions = new Questions();

/** An answer of the live model, kept once it is there. */
async function computed<T>(
  path: string,
  signal: AbortSignal,
  read: (answer: Response) => Promise<T>,
  body?: string,
): Promise<T> {
  const key = body === undefined ? path : `${path} ${body}`;
  const known = answers.get<T>(key);
  if (known) return known;
  const found = await questions.ask(key, signal, async (leaving) =>
    read(await ask(path, body === undefined ? { signal: leaving } : { method: "POST", body, signal: leaving })),
  );
  return once(key, async () => found);
}

/** What the live model answers after some changes; `body` is theirs (changes.ts). */
export const whatIf = (body: string, signal: AbortSignal): Promise<WhatIf> =>
  computed("/api/what_if", signal, (answer) => answer.json(), body);

/** The attention of a head, [query, key], or the drift of a layer's tokens, after some changes. */
export const whatIfNumbers = (
  name: "attention_after" | "token_drift",
  body: string,
  { layer, head }: Chosen,
  signal: AbortSignal,
): Promise<NamedArray> => computed(`/api/what_if/${name}${query({ layer, head })}`, signal, named, body);

/** Attention of one head in one image, [query, key], from the live model. */
export const attention = (image: string, layer: number, head: number, signal: AbortSignal): Promise<NamedArray> =>
  computed(`/api/live/attention/${image}${query({ layer, head })}`, signal, named);

/** What every head gives each patch, [layer, head, patch]: of the class token, or the mean over patches without one. */
export const headMaps = (image: string, signal: AbortSignal): Promise<NamedArray> =>
  computed(`/api/live/maps/${image}`, signal, named);

/** Class probabilities in the six region modes, [mode, class], from the live model. */
export const modes = (image: string, layer: number, head: number, signal: AbortSignal): Promise<NamedArray> =>
  computed(`/api/live/modes/${image}${query({ layer, head })}`, signal, named);

/** What decides some arrays of one image, beside the image. */
export interface Choices {
  /** On the first layer's grid, row by row. */
  patch?: number | undefined;
  channel?: number | undefined;
}

/** Arrays of one image, computed now; a refusal with the reason where the model does not have one of them. */
export async function lookAt(
  image: string,
  measures: string[],
  { patch, channel }: Choices,
  signal: AbortSignal,
): Promise<Looked> {
  const path = `/api/look/${image}/stream${query({ measures: measures.join(), patch, channel })}`;
  const looked = await computed(path, signal, async (answer) => readFrames(await answer.arrayBuffer()));
  const lacks = measures.find((name) => !(name in looked.arrays));
  if (looked.error) throw new Refusal(looked.error, 500);
  if (lacks) throw new Refusal(looked.leftOut[lacks] ?? `This model does not have ${lacks}.`, 404);
  return looked;
}

/** Measures of photographs of the visitor's own that are on their way, by the name of the photograph. */
const arriving = new Map<string, Arrivals>();

/** Until an array of a photograph of the visitor's own is there; at once for any other image. */
const arrived = async (image: string, name: string): Promise<void> => arriving.get(image)?.of(name);

/** A photograph of the visitor's own: answers the name under which the server holds it. Its prediction is there then. */
export async function look(photograph: Blob, about: Study, signal: AbortSignal): Promise<string> {
  const answer = await ask("/api/look", { method: "POST", body: photograph, signal });
  const { image } = (await answer.json()) as { image: string };
  follow(image, about);
  return image;
}

/** Asks for every measure that the study holds of its images, of a photograph of the visitor's own. */
export function follow(image: string, about: Study): void {
  const arrivals = new Arrivals();
  arriving.set(image, arrivals);
  const analyses = about.analyses.filter(({ command }) => command);
  arrivals.put(analyses.find(({ name }) => name === "base")?.measures ?? []);
  const wanted = analyses.flatMap(({ stored }) => stored).filter((name) => about.measures[name]?.dims[0] === "image");
  // What the screen asks for first, where the photograph is looked at, comes before all that.
  setTimeout(async () => {
    try {
      const { body } = await ask(`/api/look/${image}/stream${query({ measures: wanted.join() })}`);
      if (body) for await (const names of frameNames(body)) arrivals.put(names);
    } catch {
      // Each view that lacks something asks for it, and shows the server's sentence.
    } finally {
      arrivals.end();
    }
  });
}

export function thumbnail(image: string | number): string {
  if (!recording) return `/thumb/${image}`;
  const sprite = recording.thumbnails[Number(image)];
  return sprite ? `data:image/jpeg;base64,${sprite}` : "data:,";
}

const photographs = new Kept<{ address: string; bytes: number }>(
  PHOTOGRAPHS_BYTES,
  ({ bytes }) => bytes,
  ({ address }) => URL.revokeObjectURL(address),
);

/** Whether the photograph can be shown; throws the server's sentence if not. */
export async function photographAt(image: string, signal: AbortSignal): Promise<string> {
  const path = `/photo/${image}`;
  const { address } = await photographs.once(path, async () => {
    const file = await (await ask(path, { signal })).blob();
    return { address: URL.createObjectURL(file), bytes: file.size };
  });
  return address;
}
