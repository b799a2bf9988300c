"use strict";
// What the player's hands do: keyboard, mouse, touch and gamepad become held buttons and a movement.
// Which buttons there are, the server says: [{ name, key, label }], see owl_wms/inference/controls.py.

const MOUSE_SCALE = 0.04; // one unit is a full frame's turn; 25 pixels in a frame reach it
const TOUCH_SCALE = 0.02; // a finger moves further than a mouse for the same turn
const LOOK_PER_SECOND = 14; // of a gamepad's stick at its end
const DEAD_ZONE = 0.18;
const ARROWS = { ArrowUp: "KeyW", ArrowLeft: "KeyA", ArrowDown: "KeyS", ArrowRight: "KeyD" };
const WALK = ["KeyW", "KeyA", "KeyS", "KeyD"];
// A standard gamepad's buttons for the keys that games use, in the order in which further keys take what is free.
const PAD_KEYS = { 7: "Mouse0", 6: "Mouse2", 0: "Space", 10: "ShiftLeft", 2: "KeyR", 3: "KeyE", 1: "KeyF" };
const PAD_START = 9;

const held = new Set();
const sources = new Map(); // which devices hold a button: it is released when the last of them lets go
let controls = [];
let moved = [0, 0];
let changed = true;

const byKey = (key) => controls.find((button) => button.key === key)?.name;

function setControls(list) {
  if (JSON.stringify(list) === JSON.stringify(controls)) return;
  controls = list;
  const caps = list.map((button) => {
    const cap = document.createElement("kbd");
    cap.dataset.button = button.name;
    const key = document.createElement("b");
    key.textContent = keyName(button.key);
    cap.append(key, ` ${button.label}`);
    return cap;
  });
  document.getElementById("pad").replaceChildren(...caps);
  const taps = list.filter((button) => !WALK.includes(button.key)).map((button) => {
    const tap = document.createElement("button");
    tap.type = "button";
    tap.dataset.tap = button.name;
    tap.textContent = button.label;
    return tap;
  });
  document.getElementById("taps").replaceChildren(...taps);
  document.getElementById("stick").hidden = !WALK.some(byKey);
}

function keyName(key) {
  const named = { ShiftLeft: "shift", Space: "space", Mouse0: "click", Mouse1: "middle click", Mouse2: "right click" };
  return named[key] || key.replace(/^(Key|Digit)/, "");
}

function legend() {
  const walk = WALK.filter(byKey).map(keyName).join(" ");
  const rest = controls.filter((button) => !WALK.includes(button.key));
  const parts = rest.map((button) => `${keyName(button.key)} ${button.label}`);
  return [walk && `${walk} walk`, ...parts].filter(Boolean).join(" · ");
}

function hold(name, down, device = "keys") {
  if (!name) return;
  const devices = sources.get(name) || new Set();
  sources.set(name, devices);
  if (down) devices.add(device);
  else devices.delete(device);
  const now = devices.size > 0;
  if (now === held.has(name)) return;
  if (now) held.add(name);
  else held.delete(name);
  document.querySelector(`[data-button="${name}"]`)?.classList.toggle("held", now);
  document.querySelector(`[data-tap="${name}"]`)?.classList.toggle("held", now);
  changed = true;
  sendInput();
}

function release() {
  for (const devices of sources.values()) devices.clear();
  for (const name of [...held]) hold(name, false);
  sendInput(true); // a page that is being hidden has slow timers, and keys would stay down until the next
}

function look(x, y) {
  moved = [moved[0] + x, moved[1] + y];
  changed = true;
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const name = byKey(event.code) || byKey(ARROWS[event.code]);
  if (name) {
    event.preventDefault();
    hold(name, true);
  } else if (!event.repeat) {
    const does = { Backspace: () => command("restart"), KeyN: newWorld, KeyP: togglePause, Enter: fullScreen }[event.code];
    // On a focused button, Enter presses it.
    if (does && !(event.code === "Enter" && event.target instanceof HTMLButtonElement)) does();
  }
});
addEventListener("keyup", (event) => hold(byKey(event.code) || byKey(ARROWS[event.code]), false));
addEventListener("blur", release);
addEventListener("mousemove", (event) => {
  if (document.pointerLockElement === view) look(event.movementX * MOUSE_SCALE, event.movementY * MOUSE_SCALE);
});
addEventListener("mousedown", (event) => {
  if (document.pointerLockElement === view) hold(byKey(`Mouse${event.button}`), true, "mouse");
});
addEventListener("mouseup", (event) => hold(byKey(`Mouse${event.button}`), false, "mouse"));
addEventListener("contextmenu", (event) => event.preventDefault());

// Touch: a stick under the left thumb, the right half looks, the other buttons stand at the edge.
const stick = document.getElementById("stick");
const knob = stick.firstElementChild;

function walk(x, y, device) {
  hold(byKey("KeyA"), x < -0.35, device);
  hold(byKey("KeyD"), x > 0.35, device);
  hold(byKey("KeyW"), y < -0.35, device);
  hold(byKey("KeyS"), y > 0.35, device);
}

function moveStick(event) {
  const box = stick.getBoundingClientRect();
  const radius = box.width / 2;
  const at = [(event.clientX - box.left - radius) / radius, (event.clientY - box.top - radius) / radius];
  const length = Math.max(1, Math.hypot(...at));
  const [x, y] = at.map((value) => value / length);
  knob.style.transform = `translate(${x * radius * 0.6}px, ${y * radius * 0.6}px)`;
  walk(x, y, "stick");
}

stick.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  capture(stick, event);
  moveStick(event);
});
stick.addEventListener("pointermove", (event) => { if (event.buttons) moveStick(event); });
for (const type of ["pointerup", "pointercancel"]) {
  stick.addEventListener(type, () => {
    knob.style.transform = "";
    walk(0, 0, "stick");
  });
}

// A finger that slides off an element still belongs to it. A pointer that is gone cannot be captured.
function capture(element, event) {
  try {
    element.setPointerCapture(event.pointerId);
  } catch { /* it ended meanwhile */ }
}

const lookArea = document.getElementById("look");
let finger = null;
lookArea.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  capture(lookArea, event);
  finger = [event.clientX, event.clientY];
});
lookArea.addEventListener("pointermove", (event) => {
  if (!finger || !event.buttons) return;
  look((event.clientX - finger[0]) * TOUCH_SCALE, (event.clientY - finger[1]) * TOUCH_SCALE);
  finger = [event.clientX, event.clientY];
});
for (const type of ["pointerup", "pointercancel"]) lookArea.addEventListener(type, () => { finger = null; });

const taps = document.getElementById("taps");
taps.addEventListener("pointerdown", (event) => {
  if (!event.target.dataset.tap) return;
  event.preventDefault();
  capture(event.target, event);
  hold(event.target.dataset.tap, true, "touch");
});
for (const type of ["pointerup", "pointercancel"]) {
  taps.addEventListener(type, (event) => hold(event.target.dataset.tap, false, "touch"));
}

// Gamepads are polled; a button that is first pressed while the game waits begins it.
let padTime = 0;
let padDown = [];

function pollGamepad() {
  const pad = [...navigator.getGamepads()].find(Boolean);
  const now = performance.now();
  const seconds = Math.min(0.1, (now - padTime) / 1000);
  padTime = now;
  if (!pad) return;
  const down = pad.buttons.map((button) => button.pressed);
  const pressed = (index) => down[index] && !padDown[index];
  if (document.body.dataset.state !== "playing") {
    if (down.some((_, index) => pressed(index))) begin(false);
  } else if (pressed(PAD_START)) {
    pause();
  } else {
    walk(pad.axes[0] || 0, pad.axes[1] || 0, "pad");
    const turn = [pad.axes[2] || 0, pad.axes[3] || 0].map((value) => (Math.abs(value) < DEAD_ZONE ? 0 : value));
    if (turn[0] || turn[1]) look(turn[0] * LOOK_PER_SECOND * seconds, turn[1] * LOOK_PER_SECOND * seconds);
    for (const [index, key] of Object.entries(PAD_KEYS)) hold(byKey(key), !!down[index], "pad");
  }
  padDown = down;
}
