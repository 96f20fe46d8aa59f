// Every view of the page, once: the tab it is on, the question it answers, what it needs of the study, what draws it.

import type { Component } from "svelte";

import { lacking, saidOnce, type Lack, type Needs } from "../needs";
import type { TabId } from "../tabs";
import type { Context, Live, Study } from "../types";
import ChangedImages from "./compare/ChangedImages.svelte";
import ComparedHeads from "./compare/ComparedHeads.svelte";
import ComparedLayers from "./compare/ComparedLayers.svelte";
import Differences from "./compare/Differences.svelte";
import SamePhotograph from "./compare/SamePhotograph.svelte";
import WhatDiffers from "./compare/WhatDiffers.svelte";
import Every from "./Every.svelte";
import Findings from "./Findings.svelte";
import Certainty from "./heads/Certainty.svelte";
import Curves from "./heads/Curves.svelte";
import Distribution from "./heads/Distribution.svelte";
import Grid from "./heads/Grid.svelte";
import Reach from "./heads/Reach.svelte";
import Regions from "./heads/Regions.svelte";
import Spread from "./heads/Spread.svelte";
import Trend from "./heads/Trend.svelte";
import Why from "./heads/Why.svelte";
import Field from "./patches/Field.svelte";
import Hubs from "./patches/Hubs.svelte";
import Lost from "./patches/Lost.svelte";
import Pull from "./patches/Pull.svelte";
import Rests from "./patches/Rests.svelte";
import Classes from "./patterns/Classes.svelte";
import Clusters from "./patterns/Clusters.svelte";
import Landscape from "./patterns/Landscape.svelte";
import Links from "./patterns/Links.svelte";
import HeadMap from "./patterns/Map.svelte";
import Rules from "./patterns/Rules.svelte";
import Alike from "./tokens/Alike.svelte";
import ByObject from "./tokens/ByObject.svelte";
import Excited from "./tokens/Excited.svelte";
import Filters from "./tokens/Filters.svelte";
import Grouping from "./tokens/Grouping.svelte";
import Length from "./tokens/Length.svelte";
import Neuron from "./tokens/Neuron.svelte";
import Shuffle from "./tokens/Shuffle.svelte";
import Areas from "./windows/Areas.svelte";
import Boxes from "./windows/Boxes.svelte";
import Overlap from "./windows/Overlap.svelte";
import { measuresOf } from "./reach";
import Answer from "./what-if/Answer.svelte";
import Change from "./what-if/Change.svelte";
import Drift from "./what-if/Drift.svelte";
import UseThis from "./what-if/UseThis.svelte";

export interface ViewProps {
  context: Context;
  view: ViewEntry;
}

export interface ViewEntry {
  /** In words; also in the page's markup and in the names of exported files. */
  id: string;
  tab: TabId;
  /** The view's title. */
  question: string;
  /** What it would show, as a sentence, where it cannot be drawn. */
  shows: string;
  needs: Needs;
  component: Component<ViewProps>;
}

const stored = (...measures: string[]): Needs => ({ measures, live: false });
const OTHER: Needs = { measures: [], live: false, other: true };
const LIVE: Needs = { measures: [], live: true };
const HEADS: Needs = { measures: [], anyOf: "heads", live: false };

const OWN: ViewEntry[] = [
  {
    id: "findings",
    tab: "findings",
    question: "What was found?",
    shows: "What the study says, in sentences with numbers, each with the place to look at.",
    needs: { measures: [], live: false },
    component: Findings,
  },
  {
    id: "grid",
    tab: "heads",
    question: "Which heads matter?",
    shows: "Every head as a small map of where it looks, framed by what the model loses without it.",
    needs: HEADS,
    component: Grid,
  },
  {
    id: "why",
    tab: "heads",
    question: "Why this head?",
    shows: "What the study knows of the chosen head, in sentences with numbers.",
    needs: HEADS,
    component: Why,
  },
  {
    id: "certainty",
    tab: "heads",
    question: "How sure is that?",
    shows: "Every head's number with the interval of its mean.",
    needs: HEADS,
    component: Certainty,
  },
  {
    id: "regions",
    tab: "heads",
    question: "Which part of the head matters?",
    shows: "What the model says when a region of the chosen head's map is switched off.",
    needs: { measures: ["prediction"], live: true },
    component: Regions,
  },
  {
    id: "reach",
    tab: "heads",
    question: "How far does it look?",
    shows: "How much the chosen head looks at patches so many hops away.",
    needs: stored("attention_strength"),
    component: Reach,
  },
  {
    id: "spread",
    tab: "heads",
    question: "How evenly do heads look?",
    shows: "How evenly each head looks at every distance, by layer.",
    needs: stored("strength_entropy"),
    component: Spread,
  },
  {
    id: "distribution",
    tab: "heads",
    question: "How does this image compare?",
    shows: "Where this image stands among all images, for the chosen head.",
    needs: HEADS,
    component: Distribution,
  },
  {
    id: "trend",
    tab: "heads",
    question: "What changes with depth?",
    shows: "How the spread of attention changes from layer to layer.",
    needs: stored("strength_entropy"),
    component: Trend,
  },
  {
    id: "curves",
    tab: "heads",
    question: "How many heads can go?",
    shows: "Accuracy as heads are pruned one after the other, by each ranking and at random.",
    needs: { measures: [], live: false, curves: true },
    component: Curves,
  },
  {
    id: "classes",
    tab: "patterns",
    question: "What does each head look like?",
    shows: "The pattern of every head by name: itself, a step, a row, its neighbourhood, a sink, even, or content.",
    needs: stored("pattern_rule"),
    component: Classes,
  },
  {
    id: "map",
    tab: "patterns",
    question: "What does its whole map look like?",
    shows: "Every token's attention to every token, of the chosen head in this image.",
    needs: LIVE,
    component: HeadMap,
  },
  {
    id: "links",
    tab: "patterns",
    question: "What does it carry where?",
    shows: "The strongest links of the chosen head, from the tokens before its layer to those after it.",
    needs: LIVE,
    component: Links,
  },
  {
    id: "rules",
    tab: "patterns",
    question: "Why this name?",
    shows: "The numbers from which the chosen head is named, beside those of even attention.",
    needs: stored("pattern_rule"),
    component: Rules,
  },
  {
    id: "landscape",
    tab: "patterns",
    question: "Which heads are alike?",
    shows: "All maps of all heads and images, alike ones near each other, with the heads of this image.",
    needs: stored("pattern_patch_xy"),
    component: Landscape,
  },
  {
    id: "clusters",
    tab: "patterns",
    question: "Which kinds of maps are there?",
    shows: "The mean map of each group of alike maps, with its name.",
    needs: stored("pattern_patch_cluster"),
    component: Clusters,
  },
  {
    id: "field",
    tab: "patches",
    question: "How far does this patch reach?",
    shows: "How far the chosen patch reaches in each layer, beside other patches and other images.",
    needs: stored("field_size"),
    component: Field,
  },
  {
    id: "pull",
    tab: "patches",
    question: "Where is it pulled?",
    shows: "Where the chosen patch takes from, as an arrow in each layer.",
    needs: stored("tendency"),
    component: Pull,
  },
  {
    id: "hubs",
    tab: "patches",
    question: "Do all look at the same few?",
    shows: "How many patches nearly all others look at, and how much these take.",
    needs: stored("hub", "sink"),
    component: Hubs,
  },
  {
    id: "rests",
    tab: "patches",
    question: "Which patches does the answer rest on?",
    shows: "The patches that the prediction rests on most, and whether it falls without them.",
    needs: LIVE,
    component: Rests,
  },
  {
    id: "lost",
    tab: "patches",
    question: "How many patches can be lost?",
    shows: "What the answer keeps as patches are lost: any, those on the object, those beside it.",
    needs: stored("probability", "occlusion_random"),
    component: Lost,
  },
  {
    id: "alike",
    tab: "tokens",
    question: "Which patches are alike?",
    shows: "How alike the other tokens are to that of the chosen patch, layer by layer.",
    needs: LIVE,
    component: Alike,
  },
  {
    id: "length",
    tab: "tokens",
    question: "Does this token stand out?",
    shows: "How long the chosen patch's token is beside the others, layer by layer.",
    needs: stored("token_norm"),
    component: Length,
  },
  {
    id: "grouping",
    tab: "tokens",
    question: "Do tokens fall together by object?",
    shows: "Whether tokens of one object make a cluster of their own, layer by layer.",
    needs: stored("grouping_silhouette"),
    component: Grouping,
  },
  {
    id: "by-object",
    tab: "tokens",
    question: "Where do the tokens of each object lie?",
    shows: "This image's patch tokens laid out by likeness, coloured by the object that they lie on.",
    needs: { measures: ["grouping_silhouette"], live: true },
    component: ByObject,
  },
  {
    id: "shuffle",
    tab: "tokens",
    question: "Does the order of patches matter?",
    shows: "What the answer keeps when parts of the photograph change places.",
    needs: stored("probability", "shuffle_probability"),
    component: Shuffle,
  },
  {
    id: "filters",
    tab: "tokens",
    question: "Which filters find the object?",
    shows: "How far each filter of the patch embedding lets the object stand out.",
    needs: LIVE,
    component: Filters,
  },
  {
    id: "neuron",
    tab: "tokens",
    question: "What does this neuron see?",
    shows: "What one neuron of the chosen patch sees of the photograph, level by level.",
    needs: LIVE,
    component: Neuron,
  },
  {
    id: "excited",
    tab: "tokens",
    question: "Which photographs excite it?",
    shows: "The photographs in which the chosen neuron is highest, and where in them.",
    needs: { measures: ["neuron_peak", "neuron_peak_patch"], live: false },
    component: Excited,
  },
  {
    id: "areas",
    tab: "windows",
    question: "How few patches does each head need?",
    shows: "How large a window each head gets when all share one budget, and what these windows cost.",
    needs: stored("head_window_area"),
    component: Areas,
  },
  {
    id: "boxes",
    tab: "windows",
    question: "What may this patch see?",
    shows:
      "The windows that a WinT, a transformer whose patches predict what they may attend to, has for the chosen patch.",
    needs: stored("predicted_window"),
    component: Boxes,
  },
  {
    id: "overlap",
    tab: "windows",
    question: "Do windows lie where heads look?",
    shows: "Whether the windows that a WinT predicts lie where attention does, beside what chance gives.",
    needs: stored("predicted_area", "predicted_overlap_open"),
    component: Overlap,
  },
  {
    id: "change",
    tab: "what-if",
    question: "What do you change?",
    shows: "What the model answers once heads are off, patches are painted over or windows moved.",
    needs: LIVE,
    component: Change,
  },
  {
    id: "answer",
    tab: "what-if",
    question: "What does it say then?",
    shows: "The best classes before and after.",
    needs: LIVE,
    component: Answer,
  },
  {
    id: "drift",
    tab: "what-if",
    question: "Which layers notice?",
    shows: "How far the tokens of each layer move.",
    needs: LIVE,
    component: Drift,
  },
  {
    id: "use-this",
    tab: "what-if",
    question: "How do I keep it?",
    shows: "The command that does the same for good.",
    needs: LIVE,
    component: UseThis,
  },
  {
    id: "what-differs",
    tab: "compare",
    question: "What differs?",
    shows: "Two models on the same photographs: another model, before and after fine-tuning, whole and pruned.",
    needs: OTHER,
    component: WhatDiffers,
  },
  {
    id: "differences",
    tab: "compare",
    question: "By how much?",
    shows: "Every measure in both, with the interval of the difference.",
    needs: OTHER,
    component: Differences,
  },
  {
    id: "compared-layers",
    tab: "compare",
    question: "In which layers?",
    shows: "The chosen measure layer by layer in both.",
    needs: OTHER,
    component: ComparedLayers,
  },
  {
    id: "compared-heads",
    tab: "compare",
    question: "In which heads?",
    shows: "The chosen measure head by head in both.",
    needs: OTHER,
    component: ComparedHeads,
  },
  {
    id: "changed-images",
    tab: "compare",
    question: "Which images changed most?",
    shows: "The photographs that the two models treat most differently.",
    needs: OTHER,
    component: ChangedImages,
  },
  {
    id: "same-photograph",
    tab: "compare",
    question: "What do both see in this photograph?",
    shows: "The same photograph with the same overlay from both, in one scale.",
    needs: OTHER,
    component: SamePhotograph,
  },
];

/** The view of every measure, on each tab that has any. */
const EVERY = (["findings", "heads", "patterns", "patches", "tokens", "windows"] as const).map((tab): ViewEntry => ({
  id: `every-${tab}`,
  tab,
  question: "What else was measured?",
  shows: "Every measure of this tab.",
  needs: { measures: [], live: false },
  component: Every,
}));

export const VIEWS: ViewEntry[] = [...OWN, ...EVERY];

/** The view made for a measure, if there is one that needs no more than what is stored. */
export const viewOf = (measure: string): ViewEntry | undefined =>
  OWN.find(({ needs }) => !needs.live && needs.measures.includes(measure));

/** The views of a tab, each with what takes its place where the study lacks what it needs. */
export function viewsOf(
  views: ViewEntry[],
  tab: TabId,
  study: Study,
  live: Live,
): { view: ViewEntry; missing: Lack | undefined }[] {
  const own = views
    .filter((view) => view.tab === tab && (!view.id.startsWith("every-") || measuresOf(tab, study).length > 0))
    .map((view) => ({ view, missing: lacking(view, study, live) }));
  // Where a whole tab waits for the model or for another study, that is said once and not by every view of it.
  const waits = ({ view: { needs }, missing }: (typeof own)[number]) => missing && (needs.live || needs.other);
  return own.every(waits) ? own.slice(0, 1) : saidOnce(own);
}
