// Which measures of a study are one quantity for each image and head.

import type { Study } from "./types";

/** The measures that are one quantity per image and head, in the study's order; a class id or a cluster's number has no
 * mean, and exact values of a sample correct the mean of the estimate that they stand beside. */
export function headMetrics(study: Study): string[] {
  return Object.keys(study.measures).filter((name) => {
    const measure = study.measures[name];
    if (measure?.dims.join() !== "image,layer,head" || !measure.is_quantity) return false;
    return !(name.endsWith("_exact") && name.slice(0, -"_exact".length) in study.measures);
  });
}

export function firstMetric(study: Study): string {
  const metrics = headMetrics(study);
  return metrics.includes("head_probability") ? "head_probability" : (metrics[0] ?? "");
}
