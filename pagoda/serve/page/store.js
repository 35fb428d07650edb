// Conversations in localStorage, each under its own key so that two tabs do not overwrite each other's.
// A conversation: {id, title, changed, settings: {model, system, temperature, ...}, messages: [{role, content, ...}]}.

const PREFIX = "pagoda.chat.";
const conversations = new Map();

/** Reads everything, or the one conversation whose key another tab changed. */
export function load(keys = Object.keys(localStorage)) {
  for (const key of keys.filter((key) => key.startsWith(PREFIX))) {
    const id = key.slice(PREFIX.length);
    try {
      const conversation = JSON.parse(localStorage.getItem(key));
      if (conversation) conversations.set(id, conversation);
      else conversations.delete(id);
    } catch {
      console.warn(`${key} in localStorage is not a conversation`);
    }
  }
}

/** All conversations, the last changed first. */
export const all = () => [...conversations.values()].sort((a, b) => b.changed - a.changed);

export const get = (id) => conversations.get(id);

/** A conversation that is kept from its first `save` on. */
export function create(settings) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", changed: Date.now(), settings: { ...settings }, messages: [] };
}

/** Keeps the conversation; false where the browser has no room for it. */
export function save(conversation) {
  if (conversation.deleted) return true;
  conversations.set(conversation.id, conversation);
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function remove(conversation) {
  conversation.deleted = true; // an answer that still comes in does not bring it back
  conversations.delete(conversation.id);
  localStorage.removeItem(PREFIX + conversation.id);
}

/** The colours that the reader chose: "system", "light" or "dark". */
export const theme = () => localStorage.getItem("pagoda.theme") ?? "system";
export const setTheme = (name) => localStorage.setItem("pagoda.theme", name);

/** What stands in the message box, unsent; it outlives a reload. */
export const draft = (id) => sessionStorage.getItem(`pagoda.draft.${id}`) ?? "";
export const setDraft = (id, text) => sessionStorage.setItem(`pagoda.draft.${id}`, text);
