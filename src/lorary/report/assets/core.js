"use strict";
// What every plot needs: the data, colours of the present scheme, packed numbers, and when to draw again.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const short = (name, most) => (name.length > most ? name.slice(0, most - 1) + "…" : name);

function unpack(base64, Kind) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Kind(bytes.buffer);
}

// `#rrggbb` mixed with another, part = 0 leaves it as it is.
function mixed(one, other, part) {
  const channel = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  const parts = [0, 1, 2].map((i) => Math.round(channel(one, i) * (1 - part) + channel(other, i) * part));
  return "#" + parts.map((value) => value.toString(16).padStart(2, "0")).join("");
}

const NUM_HUES = 8;
const familyOf = (expert) => data.families[expert] ?? "other";
const familyColour = (family) => hueOf(data.colours[family] ?? NUM_HUES - 1);

// Colours are numbered: the hues one after the other, then again in a darker and in a paler shade (as in clusters.css).
function hueOf(number) {
  const hue = colour(`--hue-${number % NUM_HUES}`);
  const round = Math.floor(number / NUM_HUES) % 3;
  return round === 0 ? hue : mixed(hue, colour(round === 1 ? "--ink" : "--paper"), round === 1 ? 0.4 : 0.45);
}

// Experts of one family share its hue and differ in shade; without families the hues go round.
function expertColours(experts) {
  const families = new Set(experts.map(familyOf));
  const counts = new Map();
  const seen = new Map();
  const key = (expert, i) => (families.size > 1 ? familyOf(expert) : String(i % NUM_HUES));
  experts.forEach((expert, i) => counts.set(key(expert, i), (counts.get(key(expert, i)) ?? 0) + 1));
  return experts.map((expert, i) => {
    const group = key(expert, i);
    const place = seen.get(group) ?? 0;
    seen.set(group, place + 1);
    const hue = families.size > 1 ? familyColour(group) : colour(`--hue-${group}`);
    const step = place / Math.max(counts.get(group) - 1, 1);
    return place === 0 ? hue : mixed(hue, colour("--ink"), 0.4 * step);
  });
}

// An element of HTML.
function html(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// A choice: the labels in order, whose positions are the values.
function fillSelect(id, labels, chosen = 0) {
  byId(id).replaceChildren(...labels.map((label, i) => new Option(label, String(i), i === chosen, i === chosen)));
}

// Plots that are drawn: each is a function of its width that gives elements, so that another width or scheme draws it anew.
const plots = new Map();

function draw(id) {
  const element = byId(id);
  element.replaceChildren(...plots.get(id)(element.clientWidth));
}

function plot(id, build) {
  plots.set(id, build);
  draw(id);
}

function drawAll() {
  for (const id of plots.keys()) draw(id);
}
