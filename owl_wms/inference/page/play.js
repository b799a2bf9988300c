"use strict";
// The page of `owl-wms play`: draws the frames it is sent, sends the controls it is given, and measures both.
// Wire format: owl_wms/inference/messages.py.

const HEADER_BYTES = 28;
const KEYS = {
  KeyW: "W", KeyA: "A", KeyS: "S", KeyD: "D", ShiftLeft: "LSHIFT", Space: "SPACE", KeyR: "R", KeyF: "F", KeyE: "E",
  ArrowUp: "W", ArrowLeft: "A", ArrowDown: "S", ArrowRight: "D",
};
const POINTERS = { 0: "LMB", 2: "RMB" };
const MOUSE_SCALE = 0.04; // one unit is a full frame's turn; 25 pixels in a frame reach it
const SEND_MS = 1000 / 120;
const RETRY_MS = 3000;

const at = (id) => document.getElementById(id);
const view = at("view");
const context = view.getContext("2d", { alpha: false });
const held = new Set();
const drawn = []; // times of the last second's frames
const delays = []; // hand-to-eye milliseconds of the last second
let moved = [0, 0];
let changed = true;
let lastSent = 0;
let frames = 0;
let latest = -1;
let heard = 0; // the input that the last picture had seen

const scheme = location.protocol === "https:" ? "wss:" : "ws:";
const socket = new WebSocket(`${scheme}//${location.host}${location.pathname}ws`);
socket.binaryType = "arraybuffer";

function show(state, title, hint) {
  document.body.dataset.state = state;
  if (state !== "playing" && document.pointerLockElement === view) document.exitPointerLock();
  at("start").hidden = state === "playing";
  at("title").textContent = title;
  at("hint").textContent = hint;
}

function send(message) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
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

// The server rests while nothing is drawn, so a hidden page costs no GPU.
async function untilVisible() {
  while (document.hidden) {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

async function waitForTurn(reason) {
  show("refused", "Not now", `${reason}. This page tries again by itself.`);
  for (;;) {
    // Not all pages at once, and not into the browser's own error page while the server is away.
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS * (0.5 + Math.random())));
    await untilVisible();
    const answer = await fetch(location.href).catch(() => null);
    if (answer && answer.ok) location.reload();
  }
}

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
  const since = performance.now() - 1000;
  while (drawn.length && drawn[0] < since) drawn.shift();
  while (delays.length && delays[0].now < since) delays.shift();
  at("fps").textContent = drawn.length;
  const delay = median(delays.map((entry) => entry.ms));
  at("latency").textContent = Number.isNaN(delay) ? "–" : delay.toFixed(0);
}

function status(message) {
  at("backend").textContent = message.backend === "none" ? "nothing decoded" : message.backend;
  at("backend").title = message.reason || "";
  at("backend").classList.toggle("slow", message.backend === "pytorch");
  at("source").textContent = message.source;
  at("steps").textContent = message.steps || "–";
}

socket.onopen = () => show("ready", "Click to play", "W A S D to walk, mouse to look. Esc frees the mouse.");
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
socket.onclose = (event) => {
  if (document.body.dataset.state === "connecting") {
    show("closed", "No connection", "The server has stopped, or was not told of this address (--origin).");
  } else if (!["refused", "closed"].includes(document.body.dataset.state)) {
    show("closed", "Connection lost", event.reason || "Reload the page to play again.");
  }
};

function hold(name, down) {
  if (!name || down === held.has(name)) return;
  if (down) held.add(name);
  else held.delete(name);
  const cap = document.querySelector(`[data-button="${name}"]`);
  cap.classList.toggle("held", down);
  changed = true;
  sendInput();
}

function release() {
  for (const name of [...held]) hold(name, false);
  sendInput(true); // a page that is being hidden has slow timers, and keys would stay down until the next
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.code === "Backspace" && !event.repeat) send({ type: "command", name: "restart" });
  if (event.code in KEYS) {
    event.preventDefault();
    hold(KEYS[event.code], true);
  }
});
addEventListener("keyup", (event) => hold(KEYS[event.code], false));
addEventListener("blur", release);
addEventListener("mousemove", (event) => {
  if (document.pointerLockElement !== view) return;
  moved = [moved[0] + event.movementX * MOUSE_SCALE, moved[1] + event.movementY * MOUSE_SCALE];
  changed = true;
});
addEventListener("mousedown", (event) => {
  if (document.pointerLockElement === view) hold(POINTERS[event.button], true);
});
addEventListener("mouseup", (event) => hold(POINTERS[event.button], false));
addEventListener("contextmenu", (event) => event.preventDefault());
document.addEventListener("pointerlockchange", () => {
  const locked = document.pointerLockElement === view;
  if (!locked) release();
  if (["ready", "playing"].includes(document.body.dataset.state)) {
    if (locked) show("playing", "", "");
    else show("ready", "Click to play", "W A S D to walk, mouse to look. Esc frees the mouse.");
  }
});
function lock() {
  if (["ready", "playing"].includes(document.body.dataset.state)) {
    // Chromium answers with a promise, older browsers with nothing; a refusal leaves the keys working.
    Promise.resolve(view.requestPointerLock()).catch(() => {});
  }
}
at("start").addEventListener("click", lock);
view.addEventListener("click", lock);
for (const button of document.querySelectorAll("[data-command]")) {
  button.addEventListener("click", () => {
    send({ type: "command", name: button.dataset.command });
    button.blur(); // or the next Space would press it again
  });
}

setInterval(() => sendInput(), SEND_MS);
setInterval(refresh, 250);
