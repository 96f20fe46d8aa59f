// What heads look like, by name: the server's words, and how the page colours and counts them.

/** A head's pattern: its name, the name with its step, and the numbers behind it as a sentence. */
export interface NamedHead {
  layer: number;
  head: number;
  name: string;
  label: string;
  rule: string;
}

export interface HeadPattern extends NamedHead {
  /** Share of the images whose map takes that name by itself. */
  share: number | null;
  /** In the order of the rules. */
  values: (number | null)[];
  /** 0: the same map for all images. */
  image_dependence: number | null;
}

export interface Cluster {
  number: number;
  size: number;
  name: string;
  label: string;
  rule: string;
  /** Layer, head, and the share of that head's maps that are here. */
  heads: [number, number, number][];
}

export interface Patterns {
  names: string[];
  rules: string[];
  /** What each rule's number is for a head that looks evenly. */
  even: (number | null)[];
  /** From which value on each number gives the head its name. */
  holds: (number | null)[];
  heads: HeadPattern[];
  clusters: Cluster[];
}

export interface Landscape {
  n_maps: number;
  x: [number, number];
  y: [number, number];
  /** Cells along x and y. */
  shape: [number, number];
  /** x by x, from the least y up. */
  height: number[];
  clusters: { number: number; x: number; y: number }[];
}

/** As in the figures of the report: the same pattern has the same colour everywhere. */
export const COLOURS: Record<string, string> = {
  self: "#1b4f72",
  shift: "#3f88b5",
  "row band": "#7d5ba6",
  "column band": "#c6a5d8",
  local: "#4c9a6a",
  sink: "#c8470a",
  uniform: "#c9c6bd",
  content: "#e3b23c",
};

const SHORT: Record<string, string> = { "row band": "row", "column band": "column" };

/** What stands in a head's cell: the step of a shift, else the name. */
export function cellText({ name, label }: NamedHead): string {
  const step = label.indexOf(" (");
  return step >= 0 ? label.slice(step + 1) : (SHORT[name] ?? name);
}

/** Indices into the names, [layer, head]; NaN where a layer has no such head. */
export function asGrid(heads: NamedHead[], names: string[], nLayers: number, nHeads: number): Float32Array {
  const grid = new Float32Array(nLayers * nHeads).fill(NaN);
  for (const { layer, head, name } of heads) {
    const index = names.indexOf(name);
    if (index >= 0) grid[layer * nHeads + head] = index;
  }
  return grid;
}

/** How many heads take each name, in the order of the names; those that none takes are left out. */
export function counted(heads: NamedHead[], names: string[]): { name: string; n: number }[] {
  return names.map((name) => ({ name, n: heads.filter((each) => each.name === name).length })).filter(({ n }) => n > 0);
}

const FROM = 0.06;

/** A landscape as pixels, rows from the greatest y down: opacity by height, nothing where single maps blur. */
export function pixelsOf({ shape, height }: Landscape): Uint8ClampedArray {
  const [nx, ny] = shape;
  const top = height.reduce((most, value) => Math.max(most, value), 0) || 1;
  const data = new Uint8ClampedArray(4 * nx * ny);
  for (let x = 0; x < nx; x++)
    for (let y = 0; y < ny; y++) {
      const share = height[x * ny + y]! / top;
      data.set([120, 124, 132, share < FROM ? 0 : 40 + 150 * share], 4 * ((ny - 1 - y) * nx + x));
    }
  return data;
}
