// The admin API. Paths are relative to the page, so that it also works below a prefix of a proxy.

const STORED = "penstock-admin-key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

export const session = {
  get key() {
    return sessionStorage.getItem(STORED);
  },
  set key(value) {
    if (value === null) sessionStorage.removeItem(STORED);
    else sessionStorage.setItem(STORED, value);
  },
  // Called when the key in use has been refused.
  onrefused: () => {},
};

export async function fetchApi(path, { method = "GET", body, signal, key = session.key, accept = "application/json" } = {}) {
  let response;
  const headers = { Authorization: `Bearer ${key}`, Accept: accept };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    response = await fetch(`api/${path}`, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The gateway does not answer.");
  }
  if (!response.ok) {
    const error = await problem(response);
    if (response.status === 401 && key === session.key) session.onrefused(error);
    throw error;
  }
  return response;
}

export async function call(method, path, body, options = {}) {
  const response = await fetchApi(path, { method, body, ...options });
  return response.json();
}

export const get = (path, options) => call("GET", path, undefined, options);

// What an error answer says, in the API's shape or not.
export async function problem(response) {
  const text = await response.text().catch(() => "");
  try {
    const { message, code, param } = JSON.parse(text).error;
    return new ApiError(String(message), { status: response.status, code, param });
  } catch {
    return new ApiError(`The gateway answered ${response.status} ${response.statusText}`.trim(), { status: response.status });
  }
}

export const query = (fields) => {
  const set = Object.entries(fields).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return set.length ? `?${new URLSearchParams(set)}` : "";
};

// Server-sent events of a response, as {event, data}; ends with the response.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split(/\r\n\r\n|\n\n/);
      buffer = parts.pop();
      for (const part of parts) yield parseEvent(part);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseEvent(text) {
  let event = "message";
  const data = [];
  for (const line of text.split(/\r?\n/)) {
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    else if (line.startsWith("event:")) event = line.slice(6).trim();
  }
  return { event, data: data.length ? data.join("\n") : null };
}

// An id may hold a slash that is part of the path ("smollm2/0").
export const engineAction = (id, action) => call("POST", `engines/${segments(id)}/${action}`);
export const engineLog = (id, lines, options) => get(`engines/${segments(id)}/log?lines=${lines}`, options);
const segments = (id) => id.split("/").map(encodeURIComponent).join("/");
