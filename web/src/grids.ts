// Where tokens lie: the grid of a layer's patches, and the names of the tokens before them.

import type { Study } from "./types";

/** Rows and columns of a layer; of a model without a known grid, the squarest that holds the patches. */
export function gridOf(about: Study, layer: number, nPatches?: number): [number, number] {
  const known = about.grids[layer];
  if (known) return known;
  const side = Math.max(1, Math.round(Math.sqrt(Math.max(1, nPatches ?? 1))));
  return [side, side];
}

/** Where the tokens lie that a layer returns, one value each: on its own grid, or on the next layer's where it puts
 * patches together; undefined where neither has as many, as where tokens are merged. Padding is NaN. */
export function placeOfTokens(
  about: Study,
  layer: number,
  values: ArrayLike<number>,
): { grid: [number, number]; prefix: number; n: number } | undefined {
  let n = values.length;
  while (n && Number.isNaN(values[n - 1])) n--;
  for (const at of [layer, layer + 1]) {
    const [grid, prefix] = [about.grids[at], about.prefixes[at] ?? 0];
    if (grid && prefix + grid[0] * grid[1] === n) return { grid, prefix, n: grid[0] * grid[1] };
  }
  return undefined;
}

/** The values of the patches among the tokens that a layer returns, padding left out; undefined where none is known to
 * be a patch: the class token alone, or among others that lie on no grid. */
export function patchTokens(about: Study, layer: number, values: Float32Array) {
  const place = placeOfTokens(about, layer, values);
  const prefix = place?.prefix ?? about.prefixes[layer] ?? 0;
  if (!place && about.class_token && !prefix) return undefined;
  const patches = values.subarray(prefix, place && prefix + place.n).filter((value) => !Number.isNaN(value));
  return { patches, prefix, grid: place?.grid };
}

/** Who looks in the maps of all heads: the class token, or patches in layers that do not have it among their tokens. */
export function whoLooks(about: Study): string {
  const has = about.prefixes.map((prefix) => about.class_token && prefix > 0);
  if (has.every(Boolean)) return "the class token looks";
  return has.some(Boolean) ? "the class token looks, or patches in layers without it" : "patches look";
}

/** The tokens before the patches: the class token, then others, of which a study does not say whether they are registers or
 * made for distillation. */
export const prefixNames = (about: Study, prefix: number): string[] =>
  Array.from({ length: prefix }, (_, i) =>
    about.class_token && i === 0 ? "class token" : `prefix token ${about.class_token ? i : i + 1}`,
  );

/** The chosen patch on a layer's grid: the middle one where a token before the patches is chosen. */
export function chosenPatch(about: Study, layer: number, token: number): number {
  const [rows, columns] = gridOf(about, layer);
  const patch = token - (about.prefixes[layer] ?? 0);
  return patch < 0
    ? Math.floor(rows / 2) * columns + Math.floor(columns / 2)
    : Math.min(patch, Math.max(0, rows * columns - 1));
}

/** The patch of one grid that holds the first of a patch of another, as grids shrink with depth in a hierarchy. */
export function movedPatch(patch: number, from: [number, number], to: [number, number]): number {
  const row = Math.floor((Math.floor(patch / from[1]) * to[0]) / from[0]);
  return row * to[1] + Math.floor(((patch % from[1]) * to[1]) / from[1]);
}

/** Where a depth lies among the layers of a model, given theirs: 3.5 is between L3 and L4. Before the first and after the
 * last, layers go on as far apart as between the nearest two. */
export function positionAt(depth: number, depths: number[]): number {
  if (depths.length < 2) return 0;
  const after = depths.findIndex((each) => each > depth);
  const at = Math.max(0, Math.min(depths.length - 2, (after < 0 ? depths.length : after) - 1));
  return at + (depth - depths[at]!) / (depths[at + 1]! - depths[at]!);
}

/** The layer of a model, given the depths of its layers, that is nearest to a depth; of two the later one. */
export const layerAtDepth = (depth: number, depths: number[]): number =>
  depths.reduce(
    (best, each, layer) => (Math.abs(each - depth) <= Math.abs(depths[best]! - depth) + 1e-9 ? layer : best),
    0,
  );

/** How many patches of the first layer that has a grid long a patch of a layer is: 1 in all but hierarchies. */
export function patchScale(about: Pick<Study, "grids">, layer: number): number {
  const [first, grid] = [about.grids.find((each) => each !== null), about.grids[layer]];
  return first && grid ? Math.sqrt((first[0] * first[1]) / (grid[0] * grid[1])) : 1;
}

/** What the patches of a layer are called where its boxes and arrows are drawn: "patches of L3" in a hierarchy. */
export const patchesOf = (about: Pick<Study, "grids">, layer: number): string =>
  about.grids.some((_, at) => patchScale(about, at) !== 1) ? `patches of L${layer}` : "patches";

/** How many times as long as the grid of a layer what the model sees is: by rows and columns. Pixels beyond the grid belong
 * to no patch, and are cut off where patches are drawn on a photograph. */
export function beyondGrid(about: Pick<Study, "grids" | "views">, layer: number): [number, number] {
  const [grid, view] = [about.grids[layer], about.views?.[layer]];
  return grid && view ? [view[0] / grid[0], view[1] / grid[1]] : [1, 1];
}

/** The same of a grid that something is drawn on, whichever layer has it. */
export const beyondGridOf = (about: Pick<Study, "grids" | "views">, grid: [number, number]): [number, number] =>
  beyondGrid(
    about,
    about.grids.findIndex((each) => each?.join() === grid.join()),
  );

/** The token that a page begins with: the first before the patches, or the middle patch of a model without any. */
export const firstToken = (about: Study, layer: number): number =>
  about.prefixes[layer] ? 0 : chosenPatch(about, layer, -1);

/** The token of a layer where a patch of another grid lies. */
export const tokenOfPatch = (about: Study, layer: number, patch: number, grid: [number, number]): number =>
  (about.prefixes[layer] ?? 0) + movedPatch(patch, grid, gridOf(about, layer));

/** Where a layer's token lies on the grid that something is drawn on; -1 for a token before the patches. */
export const drawnPatch = (about: Study, layer: number, token: number, grid: [number, number]): number =>
  token < (about.prefixes[layer] ?? 0) ? -1 : movedPatch(chosenPatch(about, layer, token), gridOf(about, layer), grid);

/** A token of one layer as it is counted in another: a patch where it lies, a token before the patches as it is. */
export function tokenIn(about: Study, token: number, before: number, layer: number): number {
  const [from, to] = [gridOf(about, before), gridOf(about, layer)];
  const patch = token - (about.prefixes[before] ?? 0);
  if (patch < 0) return token;
  if (from.join() === to.join()) return (about.prefixes[layer] ?? 0) + patch;
  return tokenOfPatch(about, layer, chosenPatch(about, before, token), from);
}

/** The chosen patch as the server counts it: on the first layer's grid. */
export const firstPatch = (about: Study, layer: number, token: number): number =>
  movedPatch(chosenPatch(about, layer, token), gridOf(about, layer), gridOf(about, 0));

/** A patch by its place. */
export const patchName = (patch: number, columns: number): string =>
  `row ${Math.floor(patch / columns)}, column ${patch % columns}`;

/** A token as it is named: "class token", or "row 3, column 4". */
export function tokenName(about: Study, layer: number, token: number): string {
  const prefix = about.prefixes[layer] ?? 0;
  if (token < prefix) return prefixNames(about, prefix)[token] ?? `token ${token}`;
  const columns = gridOf(about, layer)[1];
  return patchName(token - prefix, columns);
}
