// How a grid of heads fills the space that it has. Pure.

interface Space {
  width: number;
  /** Room before each block, for the names of its layers. */
  left: number;
  /** A cell's greatest side. */
  largest: number;
}

/** Layers that are read at a glance: so many or fewer are never divided. */
const GLANCE = 8;

/** The layers of a block and the width of a cell, of numbers: as many blocks as the width takes at its widest cells. */
export function numberLayout(nLayers: number, nHeads: number, { width, left, largest }: Space) {
  const blocks = nLayers > GLANCE ? Math.max(1, Math.floor(width / (left + nHeads * largest))) : 1;
  return { layers: Math.ceil(nLayers / blocks), side: Math.min(largest, (width / blocks - left) / nHeads) };
}

/** The same of small maps, which are squares: as many blocks as make the cells largest. */
export function mapLayout(nLayers: number, nHeads: number, space: Space & { height: number }) {
  const { width, height, left, largest } = space;
  let best = { layers: nLayers, side: 0 };
  for (let blocks = 1; blocks <= nLayers; blocks++) {
    const layers = Math.ceil(nLayers / blocks);
    const side = Math.min(largest, (width / Math.ceil(nLayers / layers) - left) / nHeads, height / layers);
    if (side > best.side) best = { layers, side };
  }
  return best;
}
