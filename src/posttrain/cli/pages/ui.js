// What pages do by themselves: parts that change are fetched again, keys are found, two models are talked to.
"use strict";

// Said aloud once, and above the page for as long as it is so.
function stale(text) {
  const line = document.getElementById("stale");
  if (line.textContent === text) return;
  line.textContent = text;
  line.hidden = !text;
}

// A part with data-live="SECONDS" is taken from a fresh copy of the page, unless the reader is in it.
async function refresh(seconds) {
  const parts = [...document.querySelectorAll("[data-live]")];
  if (!document.hidden) {
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      stale(answer.ok ? "" : `This page is no longer fresh. ${fresh.querySelector("main p:not([hidden])")?.textContent.trim() ?? ""}`);
      const copies = answer.ok ? fresh.querySelectorAll("[data-live]") : [];
      parts.forEach((part, place) => replace(part, copies[place]));
    } catch (error) { stale("This page is no longer fresh: its server does not answer."); }
  }
  const next = Math.min(...[...document.querySelectorAll("[data-live]")].map((part) => Number(part.dataset.live)), seconds * 4);
  setTimeout(() => refresh(next), next * 1000);
}

function replace(part, copy) {
  if (!copy || part.innerHTML === copy.innerHTML || part.contains(document.activeElement)) return;
  const ticked = new Set([...part.querySelectorAll("input:checked")].map((box) => box.value));
  part.replaceChildren(...copy.childNodes);
  part.dataset.live = copy.dataset.live;
  for (const box of part.querySelectorAll("input[type=checkbox]")) box.checked = ticked.has(box.value);
}

const live = [...document.querySelectorAll("[data-live]")].map((part) => Number(part.dataset.live));
if (live.length) setTimeout(() => refresh(Math.min(...live)), Math.min(...live) * 1000);

for (const input of document.querySelectorAll("[data-filter]")) {
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const one of document.querySelectorAll(input.dataset.filter)) one.hidden = !words.every((word) => one.textContent.toLowerCase().includes(word));
  });
}

class ChatSide {
  constructor(section) {
    this.model = section.querySelector("select");
    this.turns = section.querySelector(".turns");
    this.messages = [];
  }

  line(kind, text) {
    const line = document.createElement("p");
    line.className = kind;
    line.textContent = text;
    this.turns.append(line);
    return line;
  }

  clear() { this.messages = []; this.turns.replaceChildren(); }

  async send(text, options, signal) {
    this.messages.push({ role: "user", content: text });
    this.line("user", text);
    const line = this.line("assistant", "…");
    let answer = "";
    try {
      const body = JSON.stringify({ model: this.model.value, messages: this.messages, stream: true, ...options });
      const reply = await fetch("/serve/v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
      if (!reply.ok) throw new Error((await reply.json()).error.message);
      for await (const piece of pieces(reply.body)) { answer += piece; line.textContent = answer; }
      line.textContent = answer || "(empty)";
    } catch (error) {
      line.textContent = error.name === "AbortError" ? `${answer} (stopped)` : `${answer} Error: ${error.message}`;
    }
    this.messages.push({ role: "assistant", content: answer });
  }
}

// The text of a stream of server-sent events.
async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event.choices[0]?.delta?.content ?? "";
    }
  }
}

const talk = document.querySelector("[data-chat]");
if (talk) {
  const sides = [...talk.querySelectorAll("section")].map((section) => new ChatSide(section));
  const form = document.querySelector("[data-chat-form]"), stop = document.querySelector("[data-chat-stop]");
  let going = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (going) return;
    going = new AbortController();
    stop.disabled = false;
    const text = form.message.value, options = { temperature: Number(form.temperature.value), max_tokens: Number(form.max_tokens.value) };
    form.message.value = "";
    await Promise.all(sides.map((side) => side.send(text, options, going.signal)));
    going = null;
    stop.disabled = true;
    form.message.focus();
  });
  form.message.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); } });
  stop.addEventListener("click", () => going?.abort());
  document.querySelector("[data-chat-clear]").addEventListener("click", () => sides.forEach((side) => side.clear()));
}
