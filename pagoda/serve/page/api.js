// The server's side of the page: OpenAI's API on the same host.

const KEY = "pagoda.key"; // kept in sessionStorage: gone with the tab

export const useKey = (key) => sessionStorage.setItem(KEY, key);

/** What went wrong, in words for a reader. `status` is the HTTP status, if there was an answer. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The names of the models that the server offers. */
export async function models() {
  const response = await call("/v1/models");
  return (await response.json()).data.map((model) => model.id);
}

/** Asks for an answer and yields its chunks as they come. */
export async function* chat(request, signal) {
  const response = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(request), signal });
  let finished = false;
  for await (const line of lines(response.body, signal)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The server failed.");
    finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
    yield chunk;
  }
  if (!finished) throw new ApiError("The answer broke off before its end.");
}

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("Server not reachable. Is it still running?");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const message = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`;
    throw new ApiError(message, response.status);
  }
  return response;
}

async function* lines(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split(/\r?\n/);
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke off.");
  }
  if (rest) yield rest;
}
