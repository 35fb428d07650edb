// The chat page: shows the open conversation and the list of all, and carries out what the reader does.
// State is the conversations in store.js, which answers are being made (`running`), and which conversation is open
// (`current`, also in the address after the #, so that reload, back and new tabs work).

import * as api from "./api.js";
import { $, copy, download, el, icon, morph } from "./dom.js";
import { markdown } from "./markdown.js";
import * as store from "./store.js";

const running = new Map(); // conversation id -> AbortController of the answer being made
const views = new WeakMap(); // message -> {node, body, statistics}
const pending = new Set(); // messages that are soon shown again
const prompt = $("prompt");
const log = $("log");
let models = [];
let current = null;
let isFollowing = true; // the reader is at the end of the log, and new text keeps it there

// Conversations

function open() {
  const id = location.hash.slice(1);
  if (!current || current.id !== id) current = store.get(id) ?? store.create((current ?? store.all()[0])?.settings);
  prompt.value = store.draft(current.messages.length ? current.id : "new");
  $("options").reset();
  for (const field of $("options").elements) field.value = current.settings[field.name] ?? "";
  isFollowing = true;
  showModels();
  showList();
  showLog();
  fitPrompt();
  setDrawer(false);
}

function save(conversation) {
  conversation.changed = Date.now();
  if (!store.save(conversation)) notify("The browser's storage is full: delete a conversation to keep this one.");
}

function rename(conversation, row) {
  const field = el("input", { value: conversation.title, "aria-label": "New title" });
  const finish = (keep) => {
    field.onblur = null;
    field.remove();
    if (keep && field.value.trim()) conversation.title = field.value.trim();
    store.save(conversation);
    showList();
    document.querySelector(`#conversations a[href="#${conversation.id}"]`)?.focus();
  };
  field.onblur = () => finish(true);
  field.onkeydown = (event) => {
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
    event.stopPropagation();
  };
  row.replaceChildren(field);
  field.select();
}

function remove(conversation) {
  if (!confirm(`Delete “${conversation.title}”?`)) return;
  running.get(conversation.id)?.abort();
  store.remove(conversation);
  if (conversation === current) location.hash = "";
  showList();
  focusPrompt();
}

// Asking and answering

async function send() {
  if (!models.length) await loadModels();
  const content = prompt.value.trim();
  if (!models.length || !content || running.has(current.id)) return;
  if (!current.messages.length) {
    current.title = content.split("\n")[0].slice(0, 60);
    history.replaceState(null, "", `#${current.id}`);
    store.setDraft("new", "");
  }
  current.messages.push({ role: "user", content });
  setPrompt("");
  await answer(current);
}

/** Makes the answer to the last message anew; the messages from `index` on go. */
function answerAgain(conversation, index) {
  running.get(conversation.id)?.abort();
  conversation.messages.length = index;
  focusPrompt();
  return answer(conversation);
}

async function answer(conversation) {
  const { model, system, ...sampling } = conversation.settings;
  const streaming = { stream: true, stream_options: { include_usage: true } };
  const request = { model, messages: context(conversation), ...streaming, ...sampling };
  const message = { role: "assistant", content: "", model };
  const asked = performance.now();
  const controller = new AbortController();
  conversation.messages.push(message);
  running.set(conversation.id, controller);
  $("notice").hidden = true;
  save(conversation);
  isFollowing = true;
  if (conversation === current) showLog();
  showList();
  const keeping = setInterval(() => store.save(conversation), 1000); // a reload in mid-answer loses no more than this
  try {
    for await (const chunk of api.chat(request, controller.signal))
      receive(message, chunk, (performance.now() - asked) / 1000);
  } catch (error) {
    if (controller.signal.aborted) message.ended = "stopped";
    else Object.assign(message, { error: error.message, status: error.status });
  }
  clearInterval(keeping);
  if (running.get(conversation.id) === controller) running.delete(conversation.id);
  save(conversation);
  if (message.status === 401) askForKey();
  paint(message, conversation);
  showButtons();
  showList();
}

function receive(message, chunk, seconds) {
  const [choice] = chunk.choices ?? [];
  if (choice?.delta?.content) {
    message.content += choice.delta.content;
    message.first ??= seconds;
    message.last = seconds;
    message.pieces = (message.pieces ?? 0) + 1; // about the tokens, until the server counts them
    const pause = 40 + message.content.length / 200; // ms: the machine has the model to run besides
    if (!pending.has(message)) setTimeout(() => paintStream(message), pause);
    pending.add(message);
  }
  if (choice?.finish_reason) message.ended = choice.finish_reason;
  if (chunk.usage) message.usage = chunk.usage;
}

/** What the model is told: the system prompt, then asking and answering in turn, without answers that never came. */
function context({ settings, messages }) {
  const told = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const { role, content } of messages) {
    if (!content) continue;
    if (told.at(-1)?.role === role) told.at(-1).content += `\n\n${content}`;
    else told.push({ role, content });
  }
  return told;
}

// The log

function showLog() {
  const { messages, title } = current;
  document.title = title ? `${title} · Pagoda` : "Pagoda";
  $("title").textContent = title || "New conversation";
  const logo = el("img", { src: "/page/icon.svg", alt: "" });
  const welcome = el("p", { class: "welcome" }, logo, "What would you like to know?");
  log.replaceChildren(...(messages.length ? messages.map((message) => view(message, current)) : [welcome]));
  showButtons();
  follow();
}

function showButtons() {
  const isRunning = running.has(current.id);
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("export").disabled = !current.messages.length;
}

function view(message, conversation) {
  const isLast = message === conversation.messages.at(-1);
  const isStreaming = isLast && message.role === "assistant" && running.has(conversation.id);
  const body = el("div", { class: "body" });
  const statistics = el("span", { class: "statistics" }, describe(message, isStreaming));
  const action = (name, run) => el("button", { type: "button", onclick: run }, name);
  const copyAction = action("Copy", (event) => copy(message.content, event.target));
  const bar = el("div", { class: "actions" });
  const node = el("article", { class: `message ${message.role}` }, body, bar);
  if (message.role === "user") {
    node.setAttribute("aria-label", "You");
    body.append(message.content);
    bar.append(action("Edit", () => edit(message, node, conversation)), copyAction);
  } else {
    node.setAttribute("aria-label", `Answer of ${message.model}`);
    node.classList.toggle("streaming", isStreaming);
    body.append(...markdown(message.content));
    if (message.error) body.after(el("p", { class: "error" }, message.error));
    const again = () => answerAgain(conversation, conversation.messages.indexOf(message));
    if (!isStreaming) {
      if (message.content) bar.append(copyAction);
      bar.append(action(message.error ? "Try again" : "Regenerate", again));
    }
    bar.append(statistics);
  }
  views.set(message, { node, body, statistics });
  return node;
}

/** Shows an answer that is complete, or will never be. */
function paint(message, conversation) {
  const old = views.get(message);
  if (!old?.node.isConnected) return;
  speak(message, old.body, true);
  old.node.replaceWith(view(message, conversation));
  follow();
}

/** Shows what has come in of an answer. */
function paintStream(message) {
  pending.delete(message);
  const { node, body, statistics } = views.get(message) ?? {};
  if (!node?.isConnected || !node.classList.contains("streaming")) return;
  morph(body, markdown(message.content));
  statistics.textContent = describe(message, true);
  speak(message, body, false);
  follow();
}

/** Tells screen readers the paragraphs that are complete, each once. */
function speak(message, body, isComplete) {
  if (isComplete) morph(body, markdown(message.content));
  const blocks = [...body.children];
  const from = message.pieces ? (views.get(message).spoken ?? 0) : 0;
  const to = isComplete ? blocks.length : blocks.length - 1;
  if (!from) $("spoken").replaceChildren();
  $("spoken").append(...blocks.slice(from, to).map((block) => el("p", {}, block.textContent)));
  if (isComplete && message.error) $("spoken").append(el("p", {}, message.error));
  views.get(message).spoken = Math.max(from, to);
}

function follow() {
  if (isFollowing) log.scrollTop = log.scrollHeight;
}

/** Speed and counts of an answer. The speed is that of the tokens behind the first one. */
function describe({ usage, pieces, first, last, ended, content, error }, isStreaming) {
  const parts = [];
  const tokens = usage?.completion_tokens ?? pieces;
  const about = usage ? "" : "≈ ";
  if (tokens) parts.push(`${about}${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  if (pieces > 1 && last > first) parts.push(`${about}${((tokens - 1) / (last - first)).toFixed(1)} tokens/s`);
  if (first) parts.push(`first after ${first.toFixed(2)} s`);
  if (usage?.prompt_tokens) parts.push(`prompt ${usage.prompt_tokens} tokens`);
  if (ended === "length") parts.push("length limit reached");
  if (ended === "stopped") parts.push("stopped");
  if (!ended && !error && !isStreaming) parts.push(content ? "broken off" : "no answer");
  return parts.join(" · ");
}

function edit(message, node, conversation) {
  const rows = Math.min(message.content.split("\n").length + 1, 12);
  const field = el("textarea", { value: message.content, "aria-label": "Edit your message", rows });
  const cancel = () => {
    node.replaceWith(view(message, conversation));
    focusPrompt();
  };
  const buttons = [
    el("button", { type: "submit", class: "primary" }, "Send"),
    el("button", { type: "button", class: "quiet", onclick: cancel }, "Cancel"),
  ];
  const form = el("form", { class: "edit" }, field, ...buttons);
  form.onsubmit = (event) => {
    event.preventDefault();
    const content = field.value.trim();
    if (!content) return;
    message.content = content;
    answerAgain(conversation, conversation.messages.indexOf(message) + 1);
  };
  field.onkeydown = (event) => {
    if (isSend(event)) form.requestSubmit();
    else if (event.key === "Escape") cancel();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  node.replaceChildren(form);
  field.focus();
}

// The list of conversations

function showList() {
  $("conversations").replaceChildren(
    ...store.all().map((conversation) => {
      const name = el("a", { href: `#${conversation.id}`, title: conversation.title }, conversation.title);
      if (conversation === current) name.setAttribute("aria-current", "page");
      const row = el("li", { class: running.has(conversation.id) ? "busy" : "" }, name);
      const button = (verb, run) => {
        const label = { title: verb, "aria-label": `${verb} ${conversation.title}` };
        return el("button", { type: "button", class: "icon", ...label, onclick: run }, icon(verb.toLowerCase()));
      };
      row.append(button("Rename", () => rename(conversation, row)), button("Delete", () => remove(conversation)));
      return row;
    }),
  );
  $("title").textContent = current.title || "New conversation";
}

function setDrawer(isOpen) {
  document.body.classList.toggle("drawer-open", isOpen);
  $("menu").setAttribute("aria-expanded", isOpen);
  if (isOpen) $("new").focus();
}

// Models, settings, key, notices

async function loadModels() {
  try {
    models = await api.models();
    $("notice").hidden = true;
    $("key-form").hidden = true;
    if (!models.length) notify("The server offers no model.");
  } catch (error) {
    models = [];
    if (error.status === 401) askForKey();
    else notify(error.message, loadModels);
  }
  showModels();
}

function showModels() {
  const { settings } = current;
  if (models.length && !models.includes(settings.model)) settings.model = models[0];
  const names = models.length ? models : ["no model"];
  $("model").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  $("model").disabled = !models.length;
  if (models.length) $("model").value = settings.model;
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

async function useKey() {
  api.useKey($("key").value.trim());
  $("key").value = "";
  await loadModels();
  if (!$("key-form").hidden) return notify("The server does not accept this key.");
  focusPrompt();
  const last = current.messages.at(-1);
  if (last?.status === 401) answerAgain(current, current.messages.length - 1);
}

function notify(text, retry) {
  $("notice-text").textContent = text;
  $("notice-retry").hidden = !retry;
  $("notice-retry").onclick = retry;
  $("notice").hidden = false;
}

/** Takes over what the settings say; a field that is empty or out of its range is left to the server. */
function readSettings() {
  for (const field of $("options").elements) {
    const value = field.type === "number" ? field.valueAsNumber : field.value.trim();
    if (field.validity.valid && value !== "" && !Number.isNaN(value)) current.settings[field.name] = value;
    else delete current.settings[field.name];
  }
  if (current.messages.length) store.save(current);
}

function showTheme() {
  const name = store.theme();
  document.documentElement.dataset.theme = name;
  $("theme-name").textContent = { system: "Colours of the system", light: "Light", dark: "Dark" }[name];
}

function nextTheme() {
  const order = ["system", "light", "dark"];
  store.setTheme(order[(order.indexOf(store.theme()) + 1) % order.length]);
  showTheme();
}

// The message box

const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

/** Puts the cursor into the message box, but on a touch screen does not call up the keyboard. */
function focusPrompt() {
  if (matchMedia("(pointer: fine)").matches) prompt.focus();
}

function setPrompt(text) {
  prompt.value = text;
  store.setDraft(current.messages.length ? current.id : "new", text);
  fitPrompt();
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

// What the reader does

const onClick = {
  menu: () => setDrawer(true),
  scrim: () => setDrawer(false),
  new: () => setDrawer(false),
  theme: nextTheme,
  stop: () => running.get(current.id)?.abort(),
  export: () => download(`${current.title.replace(/[^\p{L}\p{N}]+/gu, "-")}.json`, current),
  "open-settings": () => $("settings").showModal(),
  "close-settings": () => $("settings").close(),
  "done-settings": () => $("settings").close(),
  "reset-settings": () => {
    $("options").reset();
    readSettings();
  },
};
for (const [id, run] of Object.entries(onClick)) $(id).addEventListener("click", run);

const onSubmit = { composer: send, "key-form": useKey, options: () => $("settings").close() };
for (const [id, run] of Object.entries(onSubmit))
  $(id).onsubmit = (event) => {
    event.preventDefault();
    run();
  };
$("options").oninput = readSettings;
$("model").onchange = () => {
  current.settings.model = $("model").value;
  if (current.messages.length) store.save(current);
};
prompt.onkeydown = (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  send();
};
prompt.oninput = () => setPrompt(prompt.value);
$("skip").onclick = (event) => {
  event.preventDefault(); // the address after # names a conversation
  prompt.focus();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if (document.body.classList.contains("drawer-open")) {
    setDrawer(false);
    $("menu").focus();
  } else running.get(current.id)?.abort();
};
log.onscroll = () => (isFollowing = log.scrollHeight - log.scrollTop - log.clientHeight < 60);
log.onclick = ({ target }) => {
  if (target.matches(".copy-code")) copy(target.closest("figure").querySelector("code").textContent, target);
};
addEventListener("hashchange", () => {
  open();
  focusPrompt();
});
addEventListener("pagehide", () => running.has(current.id) && store.save(current));
addEventListener("storage", ({ key }) => {
  if (!key || running.has(current.id)) return;
  store.load([key]); // another tab changed it
  showList();
  if (!key.endsWith(current.id) || !store.get(current.id)) return;
  current = store.get(current.id);
  showLog();
});

store.load();
showTheme();
open();
loadModels();
