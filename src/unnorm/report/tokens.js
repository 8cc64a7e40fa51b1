const values = {{ values }};
const box = document.getElementById("tokens"), detail = document.getElementById("detail");
const hint = detail.textContent;
const shown = [...box.querySelectorAll(".group")];
function order(by) {
  box.className = `tokens by-${by}`;
  for (const group of shown)
    group.append(...[...group.children].sort((a, b) => b.dataset[by] - a.dataset[by]));
}
for (const input of box.querySelectorAll("input[name=colour]"))
  input.addEventListener("change", () => order(input.value));
document.getElementById("pair")?.addEventListener("change", (event) => {
  shown.forEach((group, i) => { group.hidden = i !== Number(event.target.value); });
  Object.assign(specs, groups[event.target.value]);
  draw(prefersDark.matches);
  box.querySelector(".t.on")?.classList.remove("on");
  detail.textContent = hint;
});
// Numbers by group, context and token, taken down before the contexts are put in another order.
shown.forEach((group, g) => [...group.children].forEach((context, c) =>
  context.querySelectorAll(".t").forEach((token, t) => { token.at = values[g][c][t]; })));
const element = (name, text) => Object.assign(document.createElement(name), { textContent: text });
function tell(token) {
  box.querySelector(".t.on")?.classList.remove("on");
  token.classList.add("on");
  const v = token.at;
  const bold = element("b", "");
  bold.append(element("code", v.token), ` at position ${v.position}: loss ${v.loss[0]} → ${v.loss[1]} (${v.change}), KL ${v.kl}`);
  detail.replaceChildren(bold, element("br", ""), "the original expects ", element("code", v.guess[0]),
    ` (${v.confidence[0]}, entropy ${v.entropy[0]}); the model `, element("code", v.guess[1]),
    ` (${v.confidence[1]}, entropy ${v.entropy[1]})`);
}
for (const event of ["pointerover", "click"])
  box.addEventListener(event, (e) => { const token = e.target.closest(".t"); if (token) tell(token); });
for (const run of box.querySelectorAll(".run-of-text")) {
  run.tabIndex = 0;
  run.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (!step) return;
    e.preventDefault();
    const all = [...run.querySelectorAll(".t")];
    const at = all.indexOf(box.querySelector(".t.on")) + step;
    tell(all[Math.min(Math.max(at, 0), all.length - 1)]);
  });
}
order("loss");
