"use strict";
// What comes from the server is only ever set as text, numbers and one data URL.
const element = (id) => document.getElementById(id);
let limit = Infinity;
let asked = 0;

fetch("models").then((response) => response.json()).then((about) => { limit = about.max_bytes; });

function show(message) {
  element("error").textContent = message;
  element("result").hidden = true;
}

function heatOf(reply, chosen) {
  // Of one token, or the mean over those that are words.
  const rows = chosen === null ? reply.words.map((token) => reply.heat[token]) : [reply.heat[chosen]];
  const size = rows[0].length;
  const flat = Array.from({ length: size * size }, (_, i) =>
    rows.reduce((sum, row) => sum + row[Math.floor(i / size)][i % size], 0) / rows.length);
  return { size, flat, most: Math.max(...flat) || 1 };
}

function paint(reply, chosen) {
  const canvas = element("heat");
  if (reply.heat === null) { canvas.hidden = true; return; }
  const { size, flat, most } = heatOf(reply, chosen);
  canvas.hidden = false;
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  flat.forEach((value, i) => image.data.set([255, 60, 0, Math.round(170 * value / most)], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.dataset.token = chosen === null ? "" : String(chosen);
  for (const button of element("words").children) {
    button.setAttribute("aria-pressed", String(button.dataset.token === canvas.dataset.token));
  }
}

function showWords(reply) {
  const seen = reply.seen || reply.tokens.map(() => 0);
  const most = Math.max(...seen) || 1;
  element("words").replaceChildren(...reply.tokens.map((token, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = token;
    button.dataset.token = String(number);
    button.style.background = `rgba(0, 100, 200, ${0.6 * seen[number] / most})`;
    button.onclick = () => paint(reply, element("heat").dataset.token === String(number) ? null : number);
    return button;
  }));
}

function showAnswers(reply) {
  element("answers").replaceChildren(...reply.groups.map((group) => {
    const table = document.createElement("table");
    for (const choice of group) {
      const row = table.insertRow();
      row.insertCell().textContent = choice.name;
      const number = row.insertCell();
      number.className = "number";
      number.textContent = choice.probability.toFixed(4);
    }
    return table;
  }));
  element("match").textContent = reply.match
    ? `match of picture and text: ${reply.match.score.toFixed(4)} (${reply.match.by})`
    : "";
  element("source").textContent = `answered by ${reply.source}`;
}

element("form").onsubmit = async (event) => {
  event.preventDefault();
  const [file] = element("file").files;
  const text = element("text").value;
  if (!file) { show("there is no picture: choose a file"); return; }
  if (!text.trim()) { show("there is no text: write a question, a caption or a sentence with [MASK]"); return; }
  if (file.size > limit) { show(`the file is larger than ${limit / 1e6} MB`); return; }
  const turn = ++asked;
  element("ask").disabled = true;
  try {
    const response = await fetch(`ask?text=${encodeURIComponent(text)}`, {
      method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file,
    });
    const reply = await response.json();
    if (turn !== asked) return;
    if (!response.ok) { show(reply.error || `error ${response.status}`); return; }
    reply.words = reply.tokens.map((_, number) => number).slice(1, -1);
    element("error").textContent = "";
    element("picture").src = reply.picture;
    showAnswers(reply);
    showWords(reply);
    paint(reply, null);
    element("result").hidden = false;
  } catch {
    show("the server does not answer");
  } finally {
    element("ask").disabled = false;
  }
};
