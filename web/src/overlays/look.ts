// What is computed of the one image when it is looked at: tokens as colours, their likeness, what the answer rests on.

import { lookAt } from "../api";
import { along, type LookArray } from "../frames";
import { gridOf } from "../grids";
import { objectColour } from "../likeness";
import type { TabId } from "../tabs";
import type { Measure, Study } from "../types";
import type { Overlay, OverlayData } from "./overlay";
import { ends, sharedTop, type Paint } from "./paint";
import { stored } from "./stored";

interface Looked {
  id: string;
  measure: string;
  title: string;
  unit: string;
  reading: string;
  source: string;
  tab: TabId;
  perPatch?: boolean;
  /** Whether values are ids of objects, each with a colour of its own. */
  objects?: boolean;
  /** The row of an array without layers: which method. */
  method?: string;
  /** Where the colour begins; without, at the lowest value of the image. */
  floor?: number;
  /** What to do where the array lacks the method. */
  without?: string;
}

const LOOKED: Looked[] = [
  {
    id: "token_similarity",
    measure: "token_similarity",
    title: "similarity to the chosen patch",
    unit: "cosine",
    reading: "Click a patch: how alike the tokens of the chosen layer are to its own.",
    source: "cosine of the patch's token with every patch token of the layer",
    tab: "tokens",
    perPatch: true,
  },
  {
    id: "token_colour",
    measure: "token_colour",
    title: "tokens as colours",
    unit: "",
    reading: "Equal colours: alike tokens. Colours of two layers cannot be compared.",
    source: "first three principal components of the layer's patch tokens, after DINOv2 (arXiv 2304.07193)",
    tab: "tokens",
  },
  {
    id: "token_outlier",
    measure: "token_outlier",
    title: "tokens of outlying length",
    unit: "",
    reading: "Marked: tokens far longer than the others of the layer, which carry no local content.",
    source: "more than 6 robust standard deviations above the median; after Darcet et al. 2023 (arXiv 2309.16588)",
    tab: "tokens",
  },
  {
    id: "patch_object",
    measure: "patch_object",
    title: "objects of the mask",
    unit: "",
    reading: "The object that covers most of each patch, of a study that was given masks.",
    source: "objects of at least 2 % of the view and 3 patches",
    tab: "tokens",
    objects: true,
  },
  {
    id: "relevance-gradient",
    measure: "relevance",
    title: "relevance for the prediction",
    unit: "",
    reading: "What the prediction rests on, by gradients and attention of all layers.",
    source: "Chefer et al. 2021 (arXiv 2103.15679)",
    tab: "patches",
    method: "gradient",
    without: "This needs a classifier, a gradient, and whole maps on one grid through all layers; the model lacks one.",
  },
  {
    id: "relevance-grad_sam",
    measure: "relevance",
    title: "relevance for the prediction, layer by layer",
    unit: "",
    reading: "What the prediction owes to attention to each patch, averaged over layers; hierarchies have it too.",
    source: "after Barkan et al. 2021 (arXiv 2204.11073)",
    tab: "patches",
    method: "grad_sam",
    without: "This needs a classifier, a gradient and keys whose place is known; the model lacks one of them.",
  },
  {
    id: "relevance-lrp",
    measure: "relevance",
    title: "relevance carried back to the pixels",
    unit: "logits",
    reading: "What the patch adds to the logit of the prediction; clear where it adds nothing or takes away.",
    source: "layer-wise relevance propagation, after Ali et al. 2022 (arXiv 2202.07304)",
    tab: "patches",
    method: "lrp",
    without: "This needs a classifier and a gradient; the model lacks one of them.",
    floor: 0,
  },
  {
    id: "relevance-rollout",
    measure: "relevance",
    title: "rollout",
    unit: "",
    reading: "Attention of all layers multiplied: what can reach the answer.",
    source: "Abnar and Zuidema 2020 (arXiv 2005.00928)",
    tab: "patches",
    method: "rollout",
    without: "This needs one grid of tokens through all layers, which the model does not have.",
  },
  {
    id: "relevance-raw",
    measure: "relevance",
    title: "attention of the last layer",
    unit: "",
    reading: "What the class token, or without one the patches on average, attend to in the last layer; any class.",
    source: "attention, heads averaged",
    tab: "patches",
    method: "raw",
  },
  {
    id: "relevance-self_similarity",
    measure: "relevance",
    title: "similarity to the image's embedding",
    unit: "",
    reading: "How alike each patch's last token is to the class token, or without one to the patches' mean; no label.",
    source: "cosine after the final norm; our construction, after DINO (arXiv 2104.14294)",
    tab: "patches",
    method: "self_similarity",
  },
  {
    id: "relevance-prototype_similarity",
    measure: "relevance",
    title: "similarity to the prototype",
    unit: "",
    reading: "How alike each patch's last token is to the mean embedding of the images in --prototype; no label.",
    source: "cosine after the final norm; prototypes after Snell et al. 2017 (arXiv 1703.05175)",
    tab: "patches",
    method: "prototype_similarity",
    without: "No prototype is given: start the page with `vitrail open .. --prototype FOLDER`.",
  },
];

const overlays = LOOKED.map((looked): Overlay => ({
  id: looked.id,
  title: looked.title,
  reading: looked.reading,
  source: looked.source,
  tabs: [looked.tab],
  live: true,
  perToken: false,
  perPatch: !!looked.perPatch,
  perHead: false,
  load: async (context, at, signal): Promise<OverlayData> => {
    const choices = looked.perPatch ? { patch: at.patch } : {};
    const { arrays } = await lookAt(at.image, [looked.measure], choices, signal);
    const array = arrays[looked.measure]!;
    if (looked.objects) return ofObjects(context.about, array, looked);
    if (looked.method) return ofMethod(context.about, array, looked);
    const measure = { dims: array.dims, title: looked.title, unit: looked.unit } as Measure;
    return stored(context.about, measure, array, at.layer);
  },
}));

/** Of tokens: before the stored measures, as they follow the chosen patch. */
export const TOKENS = overlays.filter(({ tabs }) => tabs.includes("tokens"));

/** What the answer rests on: after the stored measures, which are there at once. */
export const RELEVANCE = overlays.filter(({ tabs }) => !tabs.includes("tokens"));

/** Objects of the first layer's patches as colours; the background is left plain. */
export function ofObjects(study: Study, { values }: LookArray, { title }: Looked): OverlayData {
  const ids = [...new Set(values)].sort((a, b) => a - b);
  const rgb = Float32Array.from([...values].flatMap((id) => hexColour(objectColour(id, ids))));
  const alpha = Float32Array.from(values, (id) => (id > 0 ? 0.7 : 0));
  return { paint: () => ({ kind: "tints", grid: gridOf(study, 0, values.length), what: title, rgb, alpha }) };
}

const hexColour = (colour: string): number[] => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255);

/** One method's scores of the first layer's patches, [method, patch]. */
export function ofMethod(study: Study, array: LookArray, looked: Looked): OverlayData {
  const { method, title, unit, floor, without } = looked;
  const row = along<string>(array, "relevance_method").indexOf(method!);
  if (row < 0) throw new Error(without ?? `This model has no relevance by ${method}.`);
  const n = array.shape[1]!;
  const values = array.values.subarray(row * n, (row + 1) * n) as Float32Array;
  const low = floor ?? ends(values)[0];
  const paint = (own: boolean): Paint => ({
    kind: "weights",
    grid: gridOf(study, 0, n),
    what: title,
    values,
    floor: low,
    top: Math.max(own ? ends(values)[1] : sharedTop(values), low + 1e-9),
    floorName: "",
    unit,
    prefix: [],
  });
  return { paint: (_token, own) => paint(own) };
}
