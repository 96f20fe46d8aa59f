// Numbers and indices as they are printed.

export const headName = (layer: number, head: number): string => `L${layer}H${head}`;

/** A word or sentence that begins with a capital. */
export const capital = (text: string): string => text.charAt(0).toUpperCase() + text.slice(1);

/** Three significant digits, without an exponent where one can do without. */
export function number(value: number | undefined): string {
  if (value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4)
    return value
      .toExponential(1)
      .replace(/^(-?)1\.0e/, "$1e")
      .replace(/(\d?)e-/, (_all, digit) => `${digit && `${digit} × `}10^-`)
      .replace(/\^(-\d+)/, (_all, power) => raised(power));
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

/** How the ticks of an axis are printed: where all are tiny, against the power of ten that stands beside its title. */
export function axisNumbers(ticks: number[]): { print: (tick: number) => string; times: string } {
  const most = Math.max(0, ...ticks.map(Math.abs));
  if (!most || most >= 1e-4) return { print: number, times: "" };
  const power = Math.floor(Math.log10(most) + 1e-9);
  return { print: (tick) => number(tick / 10 ** power), times: ` × ${number(10 ** power)}` };
}

/** How a column of numbers is printed: with the decimals that give its greatest three digits, so that all compare. */
export function alike(values: ArrayLike<number>): (value: number | undefined) => string {
  let most = 0;
  for (let i = 0; i < values.length; i++) if (Number.isFinite(values[i])) most = Math.max(most, Math.abs(values[i]!));
  const decimals = most ? 2 - Math.floor(Math.log10(most)) : 0;
  if (decimals > 5 || decimals < 0) return number;
  return (value) => (value === undefined || !Number.isFinite(value) ? number(value) : value.toFixed(decimals));
}

const RAISED: Record<string, string> = {
  "-": "⁻",
  "0": "⁰",
  "1": "¹",
  "2": "²",
  "3": "³",
  "4": "⁴",
  "5": "⁵",
  "6": "⁶",
  "7": "⁷",
  "8": "⁸",
  "9": "⁹",
};
const raised = (power: string): string => [...power].map((digit) => RAISED[digit] ?? digit).join("");

export const percent = (share: number, digits = 1): string => `${(100 * share).toFixed(digits)} %`;

export const count = (n: number): string => n.toLocaleString("en");

/** So many images: "1 image", "12 images". */
export const countImages = (n: number): string => `${count(n)} image${n === 1 ? "" : "s"}`;

/** The first of several names of a class: "macaw" of "macaw, ara". */
export const className = (names: string[], index: number | undefined): string =>
  index === undefined || index < 0 ? "no label" : (names[index]?.split(",")[0] ?? `class ${index}`);

/** A unit as it stands behind a number: shares, and means of what is true or false, have none. */
export const printedUnit = (unit: string): string => (["1", "bool"].includes(unit) ? "" : unit);

/** An image's file without folders and ending, as sentences name it; other names as they are. */
export function shortName(id: string): string {
  const name = id.slice(id.lastIndexOf("/") + 1);
  const dot = name.lastIndexOf(".");
  return dot > 0 ? name.slice(0, dot) : id;
}

/** A probability with three decimals, so that a column of them compares. */
export const chance = (p: number): string => (p >= 0.0005 || p === 0 ? p.toFixed(3) : "<.001");

/** A measure's unit as it stands on an axis; a bare 1 is no unit. */
export const axisTitle = (title: string, unit: string): string =>
  unit && unit !== "1" && unit !== title ? `${title} (${unit})` : title;
