// The words and shapes that the server and the page share.

export interface Measure {
  dims: string[];
  title: string;
  unit: string;
  low: string;
  high: string;
  source: string;
  limits: string;
}

export interface Accuracy {
  value: number;
  low: number;
  high: number;
  n_right: number;
}

export interface Study {
  name: string;
  model: string;
  sizes: Record<string, number>;
  n_heads: number[];
  grids: ([number, number] | null)[];
  prefixes: number[];
  class_token: boolean;
  measures: Record<string, Measure>;
  class_names: string[];
  accuracy: Accuracy | null;
  labels_from: string;
  own_labels: boolean;
  has_map: boolean;
  has_thumbnails: boolean;
  live: boolean;
  upload: { bytes: number; pixels: number };
  left_out: Record<string, string>;
  missing_images: number;
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

/** What is known of every image at once; the map is absent in an unfinished study. */
export interface Images {
  n: number;
  xy: Float32Array | null;
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
  images: Images;
  selection: Selection;
  facts: Facts | undefined;
}
