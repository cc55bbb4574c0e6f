// Figures for people. One locale, so that two screens show the same; tabular figures and units come from here alone.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const DASH = "–";

export const integer = (n) => (n === null || n === undefined ? DASH : whole.format(n));

// 0.42  7.3  128  1,284  12.9k  3.41M
export function compact(n) {
  if (n === null || n === undefined || !Number.isFinite(n)) return DASH;
  const size = Math.abs(n);
  if (size === 0) return "0";
  if (size < 0.995) return n.toFixed(2);
  if (size < 99.95) return trim(n.toFixed(1));
  if (size < 9999.5) return whole.format(n);
  if (size < 999_500) return `${trim((n / 1e3).toFixed(size < 99_950 ? 1 : 0))}k`;
  if (size < 999_500_000) return `${trim((n / 1e6).toFixed(size < 99_950_000 ? 2 : 0))}M`;
  return `${trim((n / 1e9).toFixed(2))}B`;
}

const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

// The same for a rate that changes each second: always one decimal below 100, so that it does not jump.
export function rate(n) {
  if (n === null || n === undefined || !Number.isFinite(n)) return DASH;
  if (n < 0.05) return n > 0 ? n.toFixed(2) : "0.0";
  return n < 99.95 ? n.toFixed(1) : compact(n);
}

export function milliseconds(ms) {
  if (ms === null || ms === undefined || !Number.isFinite(ms)) return DASH;
  if (ms < 0.95) return `${ms.toFixed(2)} ms`;
  if (ms < 9.95) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${ms.toFixed(0)} ms`;
  return seconds(ms / 1000);
}

function seconds(s) {
  if (s < 9.995) return `${s.toFixed(2)} s`;
  if (s < 99.95) return `${s.toFixed(1)} s`;
  return duration(s);
}

export function duration(s) {
  const n = Math.max(0, Math.round(s));
  if (n < 60) return `${n} s`;
  if (n < 3600) return `${Math.floor(n / 60)} min${n % 60 && n < 600 ? ` ${n % 60} s` : ""}`;
  if (n < 86400) return `${Math.floor(n / 3600)} h${Math.floor((n % 3600) / 60) ? ` ${Math.floor((n % 3600) / 60)} min` : ""}`;
  return `${Math.round(n / 86400)} d`;
}

export const percent = (share) => (share === null || share === undefined || !Number.isFinite(share) ? DASH : `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`);

export function money(n) {
  if (n === null || n === undefined) return DASH;
  if (n === 0) return "0.00";
  return Math.abs(n) < 0.01 ? n.toFixed(4) : new Intl.NumberFormat("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 }).format(n);
}

const two = (n) => String(n).padStart(2, "0");
const moment = (when) => (when instanceof Date ? when : new Date(typeof when === "number" ? when * 1000 : when));

export function clock(when) {
  const d = moment(when);
  return `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
}

export function minute(when) {
  const d = moment(when);
  return `${two(d.getHours())}:${two(d.getMinutes())}`;
}

// In the reader's own time zone.
export function day(when) {
  const d = moment(when);
  return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())}`;
}

export const dateTime = (when) => (when ? `${day(when)} ${minute(when)}` : DASH);

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
export const shortDay = (when) => `${MONTHS[moment(when).getUTCMonth()]} ${moment(when).getUTCDate()}`;

// "in 3 d", "4 min ago"
export function relative(when) {
  if (!when) return DASH;
  const s = (moment(when).getTime() - Date.now()) / 1000;
  if (Math.abs(s) < 5) return "now";
  return s > 0 ? `in ${duration(s)}` : `${duration(-s)} ago`;
}

export const plural = (n, one, many = `${one}s`) => `${integer(n)} ${n === 1 ? one : many}`;
