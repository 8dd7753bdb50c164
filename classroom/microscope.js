// One text, one chosen token, and one lens through which the other tokens are coloured.
"use strict";

const record = JSON.parse(document.getElementById("record").textContent);
const text = document.getElementById("text");
const panel = document.getElementById("panel");
const caption = document.getElementById("caption");
const count = record.tokens.length;
const NEVER = 255; // the code of a habit of which there was no earlier token to tell
const ODD = ["special", "part of a character"];

// 1. Numbers

const bytes = (coded) => Uint8Array.from(atob(coded), (c) => c.charCodeAt(0));
const pairs = (coded) => new Uint16Array(bytes(coded).buffer);
for (const layer of record.layers) {
  for (const name of ["shares", "habit", "same", "weight", "half"])
    if (layer[name]) layer[name] = bytes(layer[name]);
  for (const name of ["picks", "at"])
    if (layer[name]) layer[name] = pairs(layer[name]);
}
const layersOf = (letter) => record.layers.filter((layer) => layer.letter === letter);
const halfLife = (layer, i, head) => 2 ** (layer.half[i * layer.heads + head] / 8 - 8);
const surprise = (i) => (record.p[i] === null ? 0 : -Math.log2(Math.max(record.p[i], 1e-12)));

function percent(p) {
  const digits = p > 0.0995 ? 0 : 1;
  return p < 0.00095 ? "<\u00a00.1\u00a0%" : `${(100 * p).toFixed(digits)}\u00a0%`;
}

function tokens(n) {
  if (n >= 1e5) return "100,000 or more tokens";
  const said = n < 10 ? n.toFixed(1) : Math.round(n).toLocaleString("en");
  return `${said} tokens`;
}

// Blanks at the ends of a token, and line ends, as signs.
function visible(said) {
  const dots = (blanks) => "·".repeat(blanks.length);
  return said.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, dots);
}

// What head remembers of each token once token i is read: every token since has faded it.
function left(layer, i, head) {
  const out = new Float64Array(count);
  let halvings = 0;
  for (let j = i; j >= 0; j--) {
    out[j] = 2 ** -halvings;
    halvings += 1 / halfLife(layer, j, head);
  }
  return out;
}

function looked(layer, i, head) {
  const out = new Float64Array(count);
  const from = (i * layer.heads + head) * layer.keep;
  for (let n = from; n < from + layer.keep; n++) out[layer.at[n]] += layer.weight[n] / 255;
  return out;
}

function served(layer, expert) {
  const out = new Float64Array(count);
  for (let n = 0; n < layer.picks.length; n++)
    if (layer.picks[n] === expert) out[Math.floor(n / layer.each)] = layer.shares[n] / 255;
  return out;
}

// The share of token i's experts, of all layers, that each token has too.
function shared(i) {
  const out = new Float64Array(count);
  let all = 0;
  for (const layer of layersOf("E")) {
    const mine = new Set(layer.picks.subarray(i * layer.each, (i + 1) * layer.each));
    all += layer.each;
    for (let n = 0; n < layer.picks.length; n++)
      if (mine.has(layer.picks[n])) out[Math.floor(n / layer.each)] += 1;
  }
  return out.map((n) => n / Math.max(1, all));
}

// The mean of f(layer, i, head) over every head of every layer of a kind.
function mean(letter, i, f) {
  const out = new Float64Array(count);
  let heads = 0;
  for (const layer of layersOf(letter))
    for (let head = 0; head < layer.heads; head++, heads++)
      f(layer, i, head).forEach((x, j) => (out[j] += x));
  return out.map((x) => x / Math.max(1, heads));
}

// 2. Lenses: a number of every token, its colour, and what the picture says. `at` is a head or an
// expert that is pointed at: { layer, index, detail }

const name = (i) => `“${visible(record.tokens[i])}”`;
const whose = (at, what) => `${what} ${at.index} of layer ${at.layer.place}`;
const LENSES = {
  surprise: {
    title: "Surprise",
    hue: "213 94 0",
    of: () => record.tokens.map((_, i) => Math.min(1, surprise(i) / 10)),
    says: () => "Darker: less expected. Full colour: one in a thousand, or less.",
  },
  memory: {
    title: "Memory",
    hue: "0 158 115",
    letter: "M",
    of: (i, at) => (at ? left(at.layer, i, at.index) : mean("M", i, left)),
    says: (i, at) =>
      `What ${at ? whose(at, "head") : "the Mamba heads"} still ${at ? "has" : "have"} of each ` +
      `earlier token, once ${name(i)} is read${at ? "" : ": the mean of all heads"}.`,
  },
  experts: {
    title: "Experts",
    hue: "230 140 0",
    letter: "E",
    of: (i, at) => (at ? served(at.layer, at.index) : shared(i)),
    says: (i, at) => at
      ? `The tokens that ${whose(at, "expert")} served, darker for a larger share.`
      : `How many of the experts of ${name(i)} each other token had too, over all layers.`,
  },
  attention: {
    title: "Attention",
    hue: "0 114 178",
    letter: "*",
    of: (i, at) => (at ? looked(at.layer, i, at.index) : mean("*", i, looked)),
    says: (i, at) => at
      ? `Where ${whose(at, "head")} looked from ${name(i)}.`
      : `Where attention looked from ${name(i)}: the mean of all heads.`,
  },
};
const lensOf = (layer) => Object.values(LENSES).find((lens) => lens.letter === layer.letter);

// 3. State, and what follows from it

const state = {
  token: Math.min(record.start, count - 1),
  held: false, // by a click, or the keys: pointing elsewhere does not choose
  lens: LENSES.surprise,
  point: null, // what the pointer is over
  kept: null, // what was clicked
};

// The value that has the full colour. Of a token's own experts it shares all, which says nothing.
function fullColour(lens, at, values) {
  if (lens === LENSES.surprise) return 1;
  const others = at ? values : values.filter((_, j) => j !== state.token);
  return Math.max(...others, 1e-9);
}

function colour() {
  const at = state.point || state.kept;
  const lens = at ? lensOf(at.layer) : state.lens;
  const values = Array.from(lens.of(state.token, at));
  const most = fullColour(lens, at, values);
  values.forEach((x, j) => {
    const span = text.children[j];
    const strength = 0.8 * Math.min(1, x / most);
    span.style.backgroundColor = strength > 0.02 ? `rgb(${lens.hue} / ${strength.toFixed(3)})` : "";
    span.dataset.light = x.toFixed(4);
  });
  const scale = lens !== LENSES.surprise && most < 0.995 ? `Full colour: ${percent(most)}.` : "";
  caption.textContent = [lens.says(state.token, at), scale, at ? at.detail : ""].join(" ");
  for (const button of document.querySelectorAll("#lenses button"))
    button.setAttribute("aria-pressed", String(LENSES[button.dataset.lens] === lens));
}

function choose(i) {
  text.children[state.token].classList.remove("chosen");
  if (i !== state.token && state.kept && state.kept.layer.letter === "E") state.kept = null;
  state.token = i;
  state.point = null;
  text.children[i].classList.add("chosen");
  drawPanel();
  colour();
}

function hold(held) {
  state.held = held;
  text.classList.toggle("held", held);
}

// 4. The panel

function make(tag, given, ...inside) {
  const made = Object.assign(document.createElement(tag), given);
  made.append(...inside);
  return made;
}

// An element that colours the text while it is pointed at, and after a click until the next.
function pointer(made, layer, index, detail) {
  const at = { layer, index, detail };
  const kept = () => state.kept && state.kept.layer === layer && state.kept.index === index;
  made.onpointerenter = (e) => {
    if (e.pointerType === "mouse") state.point = at;
    colour();
  };
  made.onpointerleave = () => {
    state.point = null;
    colour();
  };
  made.onclick = () => {
    state.kept = kept() ? null : at;
    state.point = null;
    for (const other of panel.querySelectorAll(".on")) other.classList.remove("on");
    made.classList.toggle("on", Boolean(kept()));
    hold(true);
    colour();
  };
  if (kept()) {
    state.kept = at;
    made.classList.add("on");
  }
  return made;
}

function heading(layer, note) {
  const title = `layer ${layer.place}: ${record.letters[layer.letter]}`;
  return make("h4", {}, title, make("span", {}, note));
}

function mamba(layer, i) {
  const each = Array.from({ length: layer.heads }, (_, head) => halfLife(layer, i, head));
  const bars = each.map((n, head) => {
    const bar = make("i", { title: `head ${head}` });
    const high = Math.min(1, Math.max(0.03, Math.log2(1 + n) / 10)); // full: a thousand tokens
    bar.style.setProperty("--high", `${100 * high}%`);
    return pointer(bar, layer, head, `Half is left after ${tokens(n)}.`);
  });
  const least = tokens(Math.min(...each)).replace(" tokens", "");
  const range = `half-lives ${least} to ${tokens(Math.max(...each))}`;
  return [heading(layer, range), make("div", { className: "heads" }, ...bars)];
}

function habitOf(code, which) {
  return code === NEVER ? `none of ${which} (the first)` : `${percent(code / 254)} of ${which}`;
}

function chip(layer, i, n) {
  const [expert, share, habit] = [layer.picks[n], layer.shares[n] / 255, layer.habit[n]];
  const kind = `the kind “${record.names[record.kinds[i]]}”`;
  const made = make("span", { className: "chip", title: `expert ${expert}` }, String(expert));
  made.style.backgroundColor = `rgb(230 159 0 / ${Math.min(1, 0.08 + 1.6 * share).toFixed(2)})`;
  made.style.setProperty("--habit", habit === NEVER ? "0%" : `${habit / 2.54}%`);
  const detail = `${percent(share)} of this token's gates. Before it, ${habitOf(habit, kind)} ` +
    `and ${habitOf(layer.same[n], name(i))} had it too.`;
  return pointer(made, layer, expert, detail);
}

function moe(layer, i) {
  const chips = Array.from({ length: layer.each }, (_, n) => chip(layer, i, i * layer.each + n));
  const note = `${layer.each} of ${layer.of} experts`;
  return [heading(layer, note), make("div", { className: "chips" }, ...chips)];
}

function attention(layer, i) {
  const rows = Array.from({ length: layer.heads }, (_, head) => {
    const order = [...looked(layer, i, head).entries()].sort((a, b) => b[1] - a[1]);
    const most = order.slice(0, 3).filter(([, weight]) => weight > 0.005);
    const seen = most.map(([j, weight]) =>
      make("span", {}, make("code", {}, visible(record.tokens[j])), ` ${percent(weight)}`));
    const said = make("div", {}, ...(seen.length ? seen : ["spread thinly over all"]));
    const row = make("div", { className: "head" }, make("span", {}, `head ${head}`), said);
    return pointer(row, layer, head, "");
  });
  return [heading(layer, "where it looked"), ...rows];
}

const DRAW = {
  M: mamba,
  E: moe,
  "*": attention,
  "-": (layer) => [heading(layer, "the same for every token")],
};

function guess([said, p, came]) {
  const bar = make("i", {});
  bar.style.width = `${100 * p}%`;
  const token = make("code", { title: said }, visible(said));
  const row = make("div", { className: "guess" }, token, bar, make("b", {}, percent(p)));
  row.classList.toggle("came", came);
  return row;
}

function guesses(i) {
  const [p, rank] = [record.p[i], record.rank[i]];
  const note = (said) => make("p", { className: "note", id: "odds" }, said);
  if (p === null) return [note("The first token: nothing came before it that could foretell it.")];
  const place = `rank ${rank.toLocaleString("en")} of ${record.vocabulary.toLocaleString("en")}`;
  const where = rank === 1 ? "the likeliest" : place;
  const rows = record.best[i].map(([said, q], n) =>
    [said, q, n + 1 === rank && said === record.tokens[i]]);
  if (!rows.some((row) => row[2])) rows.push([record.tokens[i], p, true]);
  return [note(`${percent(p)}, ${where}: ${surprise(i).toFixed(1)} bits of surprise`),
    ...rows.map(guess)];
}

// The experts of the MTP block itself, which served this draft alone.
function drafters([picks, shares]) {
  const chips = picks.map((expert, n) => {
    const title = `expert ${expert} of the MTP block: ${percent(shares[n])} of the draft's gates`;
    const made = make("span", { className: "asked", title }, String(expert));
    made.style.backgroundColor = `rgb(230 159 0 / ${Math.min(1, 0.08 + 1.6 * shares[n]).toFixed(2)})`;
    return made;
  });
  return make("div", { className: "chips drafters" }, "drafted by", ...chips);
}

function draftStory(fate, i) {
  const sure = fate.sure === null ? "" : `The MTP block gave it ${percent(fate.sure)}`;
  if (fate.place) {
    const both = sure && `${sure}, the model ${percent(record.p[i])}.`;
    return `Draft ${fate.place} of ${fate.of}, and it stood. ${both}`;
  }
  if (!fate.fell.length) return `All ${fate.of} drafts before it stood; the model added this one.`;
  const later = fate.fell.length - 1;
  const rest = later ? ` With it fell ${later} later one${later > 1 ? "s" : ""}.` : "";
  const first = visible(fate.fell[0]);
  const both = sure ? `${sure}, the model` : "the model gave it";
  return `The draft “${first}” fell here. ${both} ${percent(fate.p)}.${rest}`;
}

function draft(i) {
  const fate = record.fates[i];
  if (!fate) return [];
  const story = make("p", { className: "note", id: "draft" }, draftStory(fate, i));
  return [story, ...fate.experts.map(drafters)];
}

function drawPanel() {
  const i = state.token;
  const where = i < record.start ? "given" : "written";
  const kind = record.names[record.kinds[i]];
  const top = make("h3", {}, visible(record.tokens[i]));
  const about = make("p", {}, `token ${i} of ${count}, ${where}; kind: ${kind}`);
  const stack = record.layers.flatMap((layer) => DRAW[layer.letter](layer, i));
  const scrolled = panel.scrollTop;
  panel.replaceChildren(top, about, ...guesses(i), ...draft(i), ...stack);
  panel.scrollTop = scrolled;
}

// 5. Beginning

record.tokens.forEach((said, i) => {
  const fate = record.fates[i];
  const span = make("span", { id: `token-${i}` }, said.replace(/\n/g, "⏎\n") || "∅");
  span.classList.toggle("given", i < record.start);
  span.classList.toggle("stood", Boolean(fate && fate.place));
  span.classList.toggle("fell", Boolean(fate && fate.fell.length));
  span.classList.toggle("odd", ODD.includes(record.names[record.kinds[i]]));
  text.append(span);
});

const place = (element) => [...text.children].indexOf(element);
text.onpointerover = (e) => {
  if (!state.held && e.pointerType === "mouse" && e.target !== text) choose(place(e.target));
};
text.onclick = (e) => {
  if (e.target === text) return;
  const i = place(e.target);
  hold(!(state.held && i === state.token));
  choose(i);
};

document.onkeydown = (e) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
  if (step) {
    hold(true);
    choose(Math.min(count - 1, Math.max(0, state.token + step)));
    text.children[state.token].scrollIntoView({ block: "nearest" });
    e.preventDefault();
  } else if (e.key === "Escape") {
    hold(false);
    state.kept = null;
    choose(state.token);
  }
};

for (const [key, lens] of Object.entries(LENSES)) {
  if (lens.letter && !layersOf(lens.letter).length) continue;
  const button = make("button", { type: "button" }, lens.title);
  button.dataset.lens = key;
  button.style.setProperty("--hue", lens.hue);
  button.onclick = () => {
    state.lens = lens;
    state.kept = state.point = null;
    choose(state.token);
  };
  document.getElementById("lenses").append(button);
}
choose(state.token);
