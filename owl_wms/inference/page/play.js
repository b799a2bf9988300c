"use strict";
// The page of `owl-wms play`: draws the frames it is sent, sends the controls it is given, and measures both.
// Wire format: owl_wms/inference/messages.py. Nothing is made before the player begins, or while the game is paused.

const HEADER_BYTES = 28;
const SEND_MS = 1000 / 120;
const RETRY_MS = 3000;
const RECONNECT_MS = 1000;
const LOADING_MS = 300;
const RATE_SECONDS = 1; // of frames that the rate counts, and more of them where frames are few
const WAITING = ["ready", "paused"];

const at = (id) => document.getElementById(id);
const view = at("view");
const context = view.getContext("2d", { alpha: false });
const drawn = []; // times of the last frames
const delays = []; // hand-to-eye milliseconds of the last second
let lastSent = 0;
let frames = 0;
let latest = -1;
let heard = 0; // the input that the last picture had seen
let hiddenWhile = false; // paused by hiding the page: showing it goes on
let about = {}; // the last status
let wanted = null; // the world that was asked for and is not there yet
let rate = 0; // frames per second when the game last ran
let everOpen = false;
let everMet = false; // a server that said what can be played
let met = false; // this connection's
let socket;

function show(state, title, hint) {
  document.body.dataset.state = state;
  if (state !== "playing" && document.pointerLockElement === view) document.exitPointerLock();
  at("start").hidden = state === "playing";
  if (at("title").textContent !== title) at("said").textContent = `${title} ${hint}`;
  at("title").textContent = title;
  write(at("hint"), hint);
  at("legend").textContent = [...WAITING, "loading"].includes(state) && !document.body.classList.contains("touch") ? legend() : "";
}

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function command(name) {
  send({ type: "command", name });
}

function sendInput(atOnce = false) {
  const now = performance.now();
  if (!atOnce && (!changed || now - lastSent < SEND_MS)) return;
  const bounded = moved.map((value) => Math.max(-100, Math.min(100, value)));
  send({ type: "input", buttons: [...held], mouse: bounded, sent: now });
  moved = [0, 0];
  changed = false;
  lastSent = now;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : NaN;
}

const pauseFor = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function untilVisible() {
  while (document.hidden) {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

// ---- playing, pausing

function begin(byMouse) {
  if (!WAITING.includes(document.body.dataset.state)) return;
  const world = worldInAddress();
  if (world !== null && world !== about.seed) askFor(world);
  command("play");
  changed = true;
  show("playing", "", "");
  // A refusal (a browser wants a second between two captures) leaves the keys working; a click tries again.
  if (byMouse) Promise.resolve(view.requestPointerLock()).catch(() => {});
}

function goOn() {
  return document.body.classList.contains("touch") ? "Tap to go on." : "Click, or press P, to go on.";
}

function pause(reason = "") {
  if (document.body.dataset.state !== "playing") return;
  release();
  command("pause");
  show("paused", "Paused", `${reason} ${goOn()}`);
}

function togglePause() {
  if (document.body.dataset.state === "playing") pause();
  else begin(true);
}

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else document.documentElement.requestFullscreen?.().catch(() => {});
}

// ---- worlds: the seed stands in the address, so that the address is a link to this world

function worldInAddress() {
  const found = /^#world=(\d{1,10})$/.exec(location.hash);
  return found && Number(found[1]) < 2 ** 31 ? Number(found[1]) : null;
}

function askFor(seed) {
  wanted = seed;
  send({ type: "command", name: "new_world", ...(seed === undefined ? {} : { seed }) });
}

function newWorld() {
  if (about.seed === undefined) return;
  notice("making a new world", true);
  history.replaceState(null, "", location.pathname);
  askFor(undefined);
}

function notice(text, busy = false) {
  at("notice").hidden = !text;
  at("notice").classList.toggle("busy", busy);
  write(at("notice"), text);
}

// Between backquotes stands what is typed, which must not be broken where it has a hyphen.
function write(element, text) {
  const parts = text.split("`").map((part, index) => {
    if (index % 2 === 0) return part;
    const code = document.createElement("code");
    code.textContent = part;
    return code;
  });
  element.replaceChildren(...parts);
}

function showNotice() {
  rate = Number(at("fps").value) || rate;
  const pace = rate > 0 ? `about ${rate < 10 ? rate.toFixed(1) : rate.toFixed(0)} frames/s` : "few frames per second";
  const slow = about.device === "cpu";
  notice(slow ? `No GPU: ${pace} here. \`owl-wms play --game\` shows the real game.` : "");
}

// ---- frames

async function draw(buffer) {
  const hidden = document.hidden;
  await untilVisible();
  const header = new DataView(buffer, 0, HEADER_BYTES);
  const index = header.getUint32(0, true);
  const sent = header.getFloat64(8, true);
  const picture = await createImageBitmap(new Blob([new Uint8Array(buffer, HEADER_BYTES)]));
  if (index < latest) {
    picture.close(); // two pictures may be unpacked at once and finish in the wrong order
    send({ type: "ack", index });
    return;
  }
  latest = index;
  if (view.width !== picture.width || view.height !== picture.height) {
    view.width = picture.width;
    view.height = picture.height;
    document.documentElement.style.setProperty("--shape", picture.width / picture.height);
  }
  context.drawImage(picture, 0, 0);
  picture.close();
  const now = performance.now();
  send({ type: "ack", index });
  frames += 1;
  document.body.dataset.frames = frames;
  drawn.push(now);
  // Only the first picture that has seen an input measures it: later ones carry its time too, and it ages.
  if (sent !== heard && !hidden) delays.push({ now, ms: now - sent });
  heard = sent;
  at("dropped").textContent = header.getUint32(4, true);
  at("model").textContent = header.getFloat32(16, true).toFixed(1);
  at("decode").textContent = header.getFloat32(20, true).toFixed(1);
  // Keep asking for the time of flight while nothing is pressed.
  if (now - lastSent > 200) changed = true;
}

function refresh() {
  const now = performance.now();
  while (drawn.length > 4 && drawn[0] < now - 1000 * RATE_SECONDS) drawn.shift();
  while (drawn.length && drawn[0] < now - 10000) drawn.shift();
  while (delays.length && delays[0].now < now - Math.max(1000, now - (drawn[0] || now))) delays.shift();
  const seconds = (now - drawn[0]) / 1000;
  const rate = drawn.length > 1 ? (drawn.length - 1) / ((drawn.at(-1) - drawn[0]) / 1000) : 1 / seconds;
  const playing = document.body.dataset.state === "playing";
  at("fps").textContent = playing && rate > 0 ? rate.toFixed(rate < 10 ? 1 : 0) : "–";
  const delay = median(delays.map((entry) => entry.ms));
  at("latency").textContent = playing && !Number.isNaN(delay) ? delay.toFixed(0) : "–";
}

function status(message) {
  about = message;
  if (message.controls) setControls(message.controls);
  const plain = message.backend === "none";
  at("backend").textContent = plain ? "nothing decoded" : message.backend;
  at("backend").title = message.reason || "";
  at("backend").classList.toggle("slow", message.backend === "pytorch");
  at("source").textContent = message.source;
  at("steps").textContent = message.steps || "–";
  at("stepping").hidden = !message.steps;
  at("decoding").classList.toggle("dead", plain);
  at("worlds").hidden = message.seed === undefined;
  if (message.seed !== undefined) {
    at("world").textContent = `world ${message.seed}`;
    at("world").href = `#world=${message.seed}`;
    const arrived = wanted === null || wanted === undefined || wanted === message.seed;
    if (arrived && frames && worldInAddress() !== message.seed) history.replaceState(null, "", `#world=${message.seed}`);
    if (arrived) wanted = null;
  }
  showNotice();
  if (!met) welcome();
}

// ---- the connection

async function waitForTurn(reason) {
  show("refused", "Not now", `${reason}. This page tries again by itself.`);
  for (;;) {
    // Not all pages at once, and not into the browser's own error page while the server is away.
    await pauseFor(RETRY_MS * (0.5 + Math.random()));
    await untilVisible();
    const answer = await fetch(location.pathname).catch(() => null);
    if (answer && answer.ok) location.reload();
  }
}

async function reconnect(reason) {
  show("lost", "Connection lost", `${reason || "The server does not answer"}. This page tries again by itself.`);
  for (;;) {
    await pauseFor(RECONNECT_MS * (0.7 + 0.6 * Math.random()));
    await untilVisible();
    const answer = await fetch(location.pathname, { cache: "no-store" }).catch(() => null);
    if (answer && answer.ok) return connect();
    if (answer && answer.status === 403) {
      show("closed", "The server has a new address", "It was started with another token: open the address that it printed.");
      return undefined;
    }
  }
}

// Returns whether there is something to play; otherwise the page has said why not, or asks again by itself.
async function untilLoaded() {
  const began = performance.now();
  for (;;) {
    const answer = await fetch("loading", { cache: "no-store" }).catch(() => null);
    const loading = answer && answer.ok ? await answer.json().catch(() => null) : null;
    if (!loading) {
      reconnect();
      return false;
    }
    const bar = at("progress");
    bar.hidden = loading.ready || "failed" in loading;
    if (loading.controls) setControls(loading.controls);
    if (loading.ready) return true;
    if ("failed" in loading) {
      show("failed", "It could not start", loading.failed);
      return false;
    }
    if (loading.total) Object.assign(bar, { max: loading.total, value: loading.done });
    else bar.removeAttribute("value");
    const parts = loading.total ? `, ${loading.done} of ${loading.total}` : "";
    const seconds = Math.round((performance.now() - began) / 1000);
    show("loading", "Loading", `${loading.what}${parts} · ${seconds} s`);
    await pauseFor(LOADING_MS);
  }
}

function opened() {
  everOpen = true;
  latest = -1;
  heard = 0;
  changed = true;
  met = false;
  if (everMet) wanted = worldInAddress(); // the server begins in another: the address keeps this one for `begin`
}

// At the first status of a connection: before it, the page does not know which keys there are.
function welcome() {
  met = true;
  if (everMet) show("paused", "Connected again", goOn());
  else if (document.body.classList.contains("touch")) show("ready", "Tap to play", "Left: walk. Right: look.");
  else show("ready", "Click to play", "The mouse looks. Esc or P pauses.");
  everMet = true;
}

function closed(event) {
  const state = document.body.dataset.state;
  release();
  if (!everOpen && state === "connecting") {
    show("closed", "No connection", "The server has stopped, or was not told of this address (--origin).");
  } else if (!["refused", "closed", "lost"].includes(state)) {
    reconnect(event.reason);
  } else if (state === "lost") {
    setTimeout(reconnect, 0, event.reason);
  }
}

async function connect() {
  if (!(await untilLoaded())) return;
  if (document.body.dataset.state === "loading") show("connecting", "Connecting", "one moment");
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}${location.pathname}ws?paused=1`);
  socket.binaryType = "arraybuffer";
  socket.onopen = opened;
  socket.onclose = closed;
  socket.onmessage = (event) => {
    if (event.data instanceof ArrayBuffer) {
      draw(event.data).catch((error) => show("closed", "A frame could not be drawn", String(error)));
      return;
    }
    const message = JSON.parse(event.data);
    if (message.type === "status") status(message);
    else if (message.type === "refused") waitForTurn(message.reason);
    else if (message.type === "error") show("closed", "The game ended", message.reason);
  };
}

async function record() {
  at("record").disabled = true;
  at("record").textContent = "saving";
  const answer = await fetch(`clip.mp4?session=${about.session}`).catch(() => null);
  if (answer && answer.ok) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `owl-wms-${about.seed ?? "play"}.mp4`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }
  at("record").textContent = answer && answer.ok ? "saved" : "nothing to save yet";
  setTimeout(() => {
    at("record").textContent = "save clip";
    at("record").disabled = false;
  }, 2000);
}

// ---- the page's own events

document.addEventListener("pointerlockchange", () => {
  if (document.pointerLockElement !== view) pause(); // Esc
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    hiddenWhile = document.body.dataset.state === "playing";
    pause("The page was hidden.");
  } else if (hiddenWhile) {
    hiddenWhile = false;
    begin(false);
  }
});
addEventListener("hashchange", () => {
  const world = worldInAddress();
  if (world !== null && world !== about.seed) askFor(world);
});
// The first touch tells a phone from a mouse: its screen may be large, and a laptop may have both.
addEventListener("pointerdown", (event) => {
  const touches = event.pointerType === "touch";
  if (event.pointerType) document.body.classList.toggle("touch", touches);
}, { capture: true });
if (matchMedia("(pointer: coarse)").matches) document.body.classList.add("touch");

function beginHere() {
  if (["closed", "failed"].includes(document.body.dataset.state)) location.reload();
  else if (document.body.dataset.state === "playing") Promise.resolve(view.requestPointerLock()).catch(() => {});
  else begin(!document.body.classList.contains("touch"));
}
at("start").addEventListener("click", beginHere);
view.addEventListener("click", () => { if (!document.body.classList.contains("touch")) beginHere(); });
for (const button of document.querySelectorAll("[data-command], [data-action]")) {
  button.addEventListener("click", () => {
    const { action } = button.dataset;
    if (action === "pause") togglePause();
    else if (action === "full") fullScreen();
    else if (action === "record") record();
    else if (button.dataset.command === "new_world") newWorld();
    else command(button.dataset.command);
    button.blur(); // or the next Space would press it again
  });
}
at("full").hidden = !document.fullscreenEnabled;

connect();
setInterval(() => sendInput(), SEND_MS);
setInterval(refresh, 250);
(function poll() {
  pollGamepad();
  requestAnimationFrame(poll);
})();
