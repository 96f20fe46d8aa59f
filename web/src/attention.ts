// Reading one head's map: which cells are strong, and how a patch looks and is looked at.

import { quickselect } from "d3-array";

export interface Strong {
  /** 1 for the cells kept: exactly floor(share * cells), the strongest. */
  kept: Uint8Array;
  /** The weight of the weakest cell kept; Infinity if none is. */
  cut: number;
  n: number;
}

export function strongest(weights: ArrayLike<number>, share: number): Strong {
  const n = Math.floor(share * weights.length + 1e-9);
  const kept = new Uint8Array(weights.length);
  if (n === 0) return { kept, cut: Infinity, n };
  const sorted = Float32Array.from(weights);
  quickselect(sorted as unknown as number[], sorted.length - n);
  const cut = sorted[sorted.length - n]!;
  let ties = n;
  for (let i = 0; i < weights.length; i++) if (weights[i]! > cut) ties--;
  for (let i = 0; i < weights.length; i++) {
    if (weights[i]! > cut) kept[i] = 1;
    else if (weights[i] === cut && ties > 0) {
      kept[i] = 1;
      ties--;
    }
  }
  return { kept, cut, n };
}

/** The share of cells whose weight is at least `weight`. */
export function shareAbove(weights: ArrayLike<number>, weight: number): number {
  let n = 0;
  for (let i = 0; i < weights.length; i++) if (weights[i]! >= weight) n++;
  return n / weights.length;
}

export interface Glance {
  /** By patch. */
  patches: Float32Array;
  /** By class, distillation and register token. */
  prefix: Float32Array;
}

/** Row (where the token looks) or column (who looks at it) of a map over `n` tokens, prefix tokens apart. */
export function glance(weights: ArrayLike<number>, n: number, prefix: number, token: number, column: boolean): Glance {
  const cells = new Float32Array(n);
  for (let other = 0; other < n; other++) cells[other] = weights[column ? other * n + token : token * n + other]!;
  return { patches: cells.subarray(prefix), prefix: cells.subarray(0, prefix) };
}
