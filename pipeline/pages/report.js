"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const listings = new Map(data.listings.map((one) => [one.id, one]));

function make(tag, text, into, properties) {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  Object.assign(node, properties || {});
  if (into) into.append(node);
  return node;
}

function picture(photo, into) {
  if (!photo.image) return make("span", photo.said || photo.path, into, { className: "none", title: photo.path });
  const image = make("img", "", into, { src: photo.image, alt: photo.path, loading: "lazy", title: photo.path });
  return image;
}

function photos(all, into) {
  const grid = make("div", "", into, { className: "photos" });
  for (const photo of all) {
    const figure = make("figure", "", grid, { className: photo.rank ? "" : "dimmed" });
    picture(photo, figure);
    make("figcaption", photo.said || "rank " + photo.rank, figure);
  }
}

function button(id, note, into) {
  const known = listings.get(id);
  if (!known) return make("span", "listing " + id + note + ", not on this page", into, { className: "card quiet" });
  const link = make("a", "", into, { className: "card", href: "#listing-" + id });
  const first = known.photos.find((photo) => photo.image);
  if (first) picture(first, link);
  make("span", "listing " + id + note, link);
  return link;
}

function show(id) {
  const one = listings.get(id);
  const place = document.getElementById("listing");
  place.replaceChildren();
  if (!one) return;
  make("h3", "Listing " + id, place);
  make("p", "edited " + one.edited + ", mean of " + one.n_images + " images", place, { className: "quiet" });
  photos(one.photos, place);
  make("h3", "Nearest", place);
  const row = make("div", "", place, { className: "row" });
  for (const [other, cosine] of one.nearest) button(other, ": " + cosine.toFixed(3), row);
  if (!one.nearest.length) make("p", "There is no other.", place);
}

for (const [title, ids] of data.seeds) {
  const group = make("details", "", document.getElementById("seeds"));
  make("summary", title + " (" + ids.length + ")", group);
  const row = make("div", "", group, { className: "row" });
  for (const id of ids) button(id, "", row);
}
const first = document.querySelector("#seeds details");
if (first) first.open = true;

function follow() {
  const found = /^#listing-(-?\d+)$/.exec(location.hash);
  if (!found) return;
  show(Number(found[1]));
  const place = document.getElementById("listing");
  place.focus({ preventScroll: true });
  place.scrollIntoView();
}
addEventListener("hashchange", follow);
follow();

const chart = document.getElementById("chart");
if (data.map.length) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 1000 600");
  svg.setAttribute("role", "application");
  svg.setAttribute("aria-label", "Map of " + data.map.length + " listings; arrow keys walk from one to the next");
  svg.setAttribute("tabindex", "0");
  const dots = data.map.map(([id, x, y]) => {
    const dot = document.createElementNS(space, "circle");
    dot.setAttribute("cx", 10 + 980 * x);
    dot.setAttribute("cy", 590 - 580 * y);
    dot.setAttribute("r", 6);
    svg.append(dot);
    return dot;
  });
  const pointed = document.getElementById("pointed");
  let at = -1;
  const point = (index) => {
    if (at >= 0) dots[at].removeAttribute("class");
    at = index;
    dots[at].setAttribute("class", "at");
    const [id, , , image] = data.map[at];
    pointed.replaceChildren();
    if (image) make("img", "", pointed, { src: image, alt: "", className: "thumb" });
    make(listings.has(id) ? "a" : "span", "listing " + id, pointed, listings.has(id) ? { href: "#listing-" + id } : {});
  };
  dots.forEach((dot, index) => {
    dot.addEventListener("pointerenter", () => point(index));
    dot.addEventListener("click", () => { if (listings.has(data.map[index][0])) location.hash = "listing-" + data.map[index][0]; });
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) { event.preventDefault(); point((at + step + dots.length) % dots.length); }
    if (event.key === "Enter" && at >= 0 && listings.has(data.map[at][0])) location.hash = "listing-" + data.map[at][0];
  });
  chart.append(svg);
}
