import { expect, test } from "vitest";

import {
  alike,
  axisNumbers,
  axisTitle,
  chance,
  className,
  count,
  countImages,
  headName,
  number,
  percent,
} from "../src/format";

test("numbers keep three significant digits", () => {
  expect(number(0.123456)).toBe("0.123");
  expect(number(-12.345)).toBe("-12.3");
  expect(number(0)).toBe("0");
  expect(number(1234.5)).toBe("1,235");
  expect(number(0.00002345)).toBe("2.3 × 10⁻⁵");
  const tiny = axisNumbers([-2e-5, 0, 2e-5]);
  expect([tiny.times, ...[-2e-5, 0, 2e-5].map(tiny.print)]).toEqual([" × 10⁻⁵", "-2", "0", "2"]);
  expect(axisNumbers([0, 0.5]).times).toBe("");
  expect([number(1e-5), number(-1e-6), number(1.04e-5)]).toEqual(["10⁻⁵", "-10⁻⁶", "10⁻⁵"]);
});

test("a number that is missing is a dash", () => {
  expect(number(undefined)).toBe("–");
  expect(number(NaN)).toBe("–");
});

test("shares, counts and heads read as in the report", () => {
  expect(percent(0.1234)).toBe("12.3 %");
  expect(percent(0.5, 0)).toBe("50 %");
  expect(count(50000)).toBe("50,000");
  expect(headName(3, 7)).toBe("L3H7");
});

test("a class is named by its first synonym, or by its number", () => {
  expect(className(["macaw, ara"], 0)).toBe("macaw");
  expect(className(["macaw, ara"], 4)).toBe("class 4");
  expect(className(["macaw, ara"], -1)).toBe("no label");
  expect(className([], undefined)).toBe("no label");
});

test("a small probability is not printed as zero", () => {
  expect(chance(0.0004)).toBe("<.001");
  expect(chance(0)).toBe("0.000");
  expect(chance(0.25)).toBe("0.250");
});

test("an axis names the unit unless the title does already", () => {
  expect(axisTitle("entropy", "nats")).toBe("entropy (nats)");
  expect(axisTitle("probability", "1")).toBe("probability");
  expect(axisTitle("probability", "probability")).toBe("probability");
});

test("numbers of one chart share their decimals, unless those would be many", () => {
  expect([0.06, -0.0189, 0.000068].map(alike([0.06, -0.0189, 0.000068]))).toEqual(["0.0600", "-0.0189", "0.0001"]);
  expect([12.34, 2].map(alike([12.34, 2, NaN]))).toEqual(["12.3", "2.0"]);
  expect(alike([1e-9])(1e-9)).toBe(number(1e-9));
  expect(alike([1])(NaN)).toBe("–");
});

test("a single image is no plural", () => {
  expect([0, 1, 2, 1234].map(countImages)).toEqual(["0 images", "1 image", "2 images", "1,234 images"]);
});
