// What is wrong with a page, in words.
() => {
  const wrong = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const isShown = (element) => element.checkVisibility({ visibilityProperty: true });
  const say = (element, words) => wrong.push(`${words}: ${element.outerHTML.slice(0, 120)}`);
  const nameOf = (element) =>
    element.getAttribute("aria-label") || [...(element.labels ?? [])].map((label) => label.textContent).join(" ") ||
    (element.matches("button, a, summary, th") ? element.textContent : "");
  if (!document.documentElement.lang) wrong.push("no language");
  if (!document.title) wrong.push("no title");
  if (all("h1").length !== 1) wrong.push("not one first heading");
  for (const element of all("input, select, textarea, button, a, summary, [role=listbox], [role=region], [role=img], [role=option]")) {
    if (isShown(element) && !nameOf(element).trim()) say(element, "no name");
  }
  for (const element of all("[tabindex]")) if (element.tabIndex > 0) say(element, "an order of its own");
  for (const element of all("th")) if (!element.scope) say(element, "a heading of nothing");
  for (const element of all("[role=option]")) if (!element.closest("[role=listbox]")) say(element, "an option of no list");
  for (const attribute of ["aria-describedby", "aria-activedescendant", "for"]) {
    for (const element of all(`[${attribute}]`)) {
      if (!document.getElementById(element.getAttribute(attribute))) say(element, `${attribute} leads nowhere`);
    }
  }
  const ids = all("[id]").map((element) => element.id);
  if (new Set(ids).size < ids.length) wrong.push("an id stands twice");
  let level = 1;
  for (const heading of all("h1, h2, h3, h4, h5").filter(isShown)) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) say(heading, "a level is left out");
    level = next;
  }
  if (document.documentElement.scrollWidth > innerWidth) wrong.push("the page scrolls sideways");
  const channels = (text) => (text.match(/[\d.]+/g) ?? []).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = colour.map((value) => value / 255).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = channels(getComputedStyle(at).backgroundColor);
      if (a > 0.99 && r !== undefined) return [r, g, b];
    }
    return [255, 255, 255];
  };
  for (const element of all("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const isPicture = element.closest("svg, .token, noscript, script, style, template, option, [aria-hidden=true]");
    if (!hasText || isPicture || !isShown(element) || element.closest(":disabled")) continue;
    const style = getComputedStyle(element);
    const [one, two] = [channels(style.color).slice(0, 3), ground(element)].map(luminance).sort((a, b) => b - a);
    const isLarge = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && Number(style.fontWeight) >= 700);
    const contrast = (one + 0.05) / (two + 0.05);
    if (contrast < (isLarge ? 3 : 4.5)) say(element, `contrast ${contrast.toFixed(2)}`);
  }
  return wrong;
}
