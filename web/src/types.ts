// The words and shapes that the server and the page share.

export interface Measure {
  dims: string[];
  title: string;
  /** In a hierarchy lengths are in patches of its first layer; values of boxes and arrows (dimensions `side` and `xy`) come
   * in patches of their layer, which they are drawn in, and are told in this unit. */
  unit: string;
  low: string;
  high: string;
  source: string;
  limits: string;
  /** The measure of the plain pass that this one is read against; empty where values stand for themselves. */
  baseline: string;
  /** Whether a mean of it says something: not of class ids, cluster numbers, places on a layout. */
  is_quantity: boolean;
  analysis: string;
}

/** The model behind the page: asked only once it is ready. */
export interface Live {
  state: "none" | "loading" | "ready" | "failed";
  reason: string;
}

export interface Accuracy {
  value: number;
  /** 95 %; null of a single image, which has no interval. */
  low: number | null;
  high: number | null;
  n_right: number;
}

/** An analysis of the register, and what this study holds of it. */
export interface Analysis {
  name: string;
  title: string;
  question: string;
  /** The models that have it; empty for any. */
  only_for: string;
  measures: string[];
  stored: string[];
  command: string;
}

/** Accuracy over the number of heads pruned, by ranking; no rankings where the study has no curves. */
export interface Curves {
  counts: number[];
  rankings: {
    name: string;
    least: number[];
    most: number[];
    /** Between its two curves, with an interval over images, and how far from 0 the best of as many orders at random may lie. */
    area: {
      value: number | null;
      low: number | null;
      high: number | null;
      chance: number | null;
      /** Share of the random orders that keep less with the least important first. */
      beaten: number | null;
    };
  }[];
  random: { low: number[]; mean: number[]; high: number[]; orders: number; images: number };
  /** What the shares of right answers are: accuracy, or agreement with the model's own answers. */
  correctness: string;
  /** Test images, which ranked nothing. */
  images: number;
}

/** A map of the images. */
export interface ImageMap {
  name: string;
  title: string;
  /** The array that places images on it. */
  table: string;
}

export interface Study {
  name: string;
  /** How commands call its folder, for a shell. */
  in_commands: string;
  model: string;
  sizes: Record<string, number>;
  /** What the places along a dimension are called, or the numbers that they stand for; others count from 0. */
  places: Record<string, (string | number)[]>;
  n_heads: number[];
  grids: ([number, number] | null)[];
  /** Rows and columns of what the model sees, in patches of each layer: more than those of the grid where pixels are left
   * over that belong to no patch. */
  views: ([number, number] | null)[];
  /** Where each layer lies between input (0) and output (1), among all blocks of the model. */
  depths: number[];
  prefixes: number[];
  /** Layers that return the patches that they are given; null where the study does not say. */
  own_grid_layers: number[] | null;
  class_token: boolean;
  measures: Record<string, Measure>;
  analyses: Analysis[];
  class_names: string[];
  accuracy: Accuracy | null;
  labels_from: string;
  own_labels: boolean;
  /** Whether `vitrail curves` wrote pruning curves into it. */
  has_curves: boolean;
  /** Maps of its images that it can give, the first one drawn unless another is chosen. */
  maps: ImageMap[];
  has_thumbnails: boolean;
  live: Live;
  /** The head that matters most, and the image that needs it most. */
  start: { layer: number; head: number; image: number };
  upload: { bytes: number; pixels: number };
  /** Studies of the same images that it can be compared with, by name. */
  others: string[];
  /** Images whose attention is in the file, where the page is one; empty behind a server. */
  recorded_maps: number[];
  left_out: Record<string, string>;
  missing_images: number;
  /** Measures that `vitrail study` is adding, or was when it was stopped: not every image has them yet. */
  missing_measures: string[];
  /** What has been added since the server opened the study, which has it only once it is started again. */
  arrived_images: number;
  arrived_measures: string[];
}

export type Numbers = Float32Array | Int32Array | Uint8Array;

/** An array as it came: names of its dimensions, their sizes, and the values in C order. */
export interface NamedArray {
  dims: string[];
  shape: number[];
  values: Numbers;
}

/** Statistics over a set of images; `values` leads with the dimension `statistic`. */
export interface Summary extends NamedArray {
  n_images: number;
  quantiles_of: number;
  interval: string;
}

export const STATISTICS = ["mean", "low", "high", "q05", "median", "q95"] as const;
export type Statistic = (typeof STATISTICS)[number];

/** A sentence with numbers, and what of the study it speaks of. */
export interface Sentence {
  text: string;
  /** The measure that its numbers are read from; empty if it speaks of none. */
  measure: string;
  layer: number | null;
  head: number | null;
  images: { image: number; words: string }[];
  /** What those images are. */
  caption: string;
  /** Numbers of all layers of which the text gives one; empty where that is the mean of the measure. */
  by_layer: (number | null)[];
  by_layer_title: string;
}

/** The model's answer after one change more. */
export interface WhatIfStep {
  words: string;
  probability?: number;
  divergence?: number;
  value?: number;
  output_shift?: number;
}

/** What the live model answers to changes of heads, patches and windows. */
export interface WhatIf {
  steps: WhatIfStep[];
  /** The best classes before and after. */
  classes: { class: number; name: string; before: number; after: number }[];
  /** By layer; null where its tokens cannot be compared. */
  drift: (number | null)[];
  /** What the same costs over all images; null where the study does not know. */
  study: string | null;
  /** The command or the Python lines that do the same elsewhere. */
  use_this: string;
  left_out: Record<string, string>;
}

/** A measure in two studies; differences are the second less the first. */
export interface ComparedMeasure {
  name: string;
  title: string;
  unit: string;
  by_layer: boolean;
  by_head: boolean;
  mean_a: number | null;
  mean_b: number | null;
  mean_difference: number | null;
  /** 95 % of the mean difference, alone. */
  low: number | null;
  high: number | null;
  /** Of random signs, corrected for all measures. */
  p: number | null;
  /** The mean difference in standard deviations of the difference over images; null where every image differs by the
   * same, which is infinite, and where a single image says nothing of a spread; 0 where no image differs. */
  standardised: number | null;
  /** Whether every image differs by the same. */
  alike: boolean;
}

/** What differs between this study and another of the same images. */
export interface Comparison {
  names: [string, string];
  n_shared: number;
  n_compared: number;
  same_heads: boolean;
  heads_correspond: boolean;
  alpha: number;
  labels: string;
  left_out: Record<string, string>;
  /** Where the tokens of the other study lie, and the measures that it holds of each image. */
  other: Pick<Study, "grids" | "views" | "depths" | "prefixes" | "class_token" | "n_heads"> & { measures: string[] };
  /** Where layers are compared, 0 to 1 from input to output. */
  depth: number[];
  findings: Sentence[];
  measures: ComparedMeasure[];
  /** Those that changed most, in all measures together. */
  images: { image: number; change: number; same: boolean | null }[];
}

/** One image in two studies. */
export interface ComparedImage {
  compared: boolean;
  /** Null where it has no value in any measure. */
  change?: number | null;
  same?: boolean | null;
  /** By measure, the second less the first; null where one of them has no value. */
  differences: Record<string, number | null>;
}

/** What is known of every image at once. */
export interface Images {
  n: number;
  label: Int32Array;
  prediction: Int32Array | null;
  probability: Float32Array | null;
}

/** The images that the brush holds: `mask` by image, `indices` in order; `all` when nothing is brushed. */
export interface Selection {
  /** The brush that made it. */
  key: string;
  all: boolean;
  mask: Uint8Array;
  indices: Int32Array;
}

/** What is known of the image at hand, stored or uploaded. */
export interface Facts {
  image: string;
  label: number;
  prediction: number | undefined;
  probability: number | undefined;
  id: string;
}

/** What every view is given. */
export interface Context {
  about: Study;
  /** Whether the model is open behind the page. */
  live: boolean;
  images: Images;
  selection: Selection;
  facts: Facts | undefined;
}
