// The connection: who we are talking to, the websocket, and whether what is shown is still true.

const SILENT_MS = 1500; // nothing new for this long: what is shown may not be true any more
const ANSWER_MS = 8000;
const RETRY_MS = [300, 1000, 2000, 3000];

export class Link {
  /**
   * @param handlers state(sections), picture(camera, blob, done), connection(state, text)
   */
  constructor(handlers) {
    this.handlers = handlers;
    this.attempt = 0;
    this.socket = null;
    this.tick = -1;
    this.heardAt = 0;
    this.channel = 0;
    document.addEventListener("visibilitychange", () => this.send({ looking: !document.hidden }));
    window.addEventListener("offline", () => this.socket?.close());
    setInterval(() => this.judge(), 250);
  }

  /** What the robot is; null where a token is needed. */
  static async hello() {
    const answer = await fetch("/api/hello", { cache: "no-store" });
    if (answer.status === 401) return null;
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }

  open() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/api/socket`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => {
      this.heardAt = performance.now();
      this.tick = -1;
      this.send({ looking: !document.hidden, channel: this.channel });
    };
    socket.onmessage = (event) => this.take(event.data);
    socket.onclose = () => {
      if (this.socket !== socket) return;
      this.socket = null;
      this.judge();
      const wait = RETRY_MS[Math.min(this.attempt++, RETRY_MS.length - 1)];
      setTimeout(() => this.reopen(), wait);
    };
  }

  async reopen() {
    try {
      if ((await Link.hello()) === null) {
        location.reload(); // the session has ended: ask for the token again
        return;
      }
    } catch {
      setTimeout(() => this.reopen(), RETRY_MS[Math.min(this.attempt++, RETRY_MS.length - 1)]);
      return;
    }
    this.open();
  }

  take(data) {
    if (typeof data === "string") {
      const sections = JSON.parse(data);
      this.send({ taken: true });
      if (sections.ages && sections.ages.tick !== this.tick) {
        this.tick = sections.ages.tick;
        this.heardAt = performance.now();
        this.attempt = 0;
      }
      this.handlers.state(sections);
      this.judge();
    } else {
      const camera = new DataView(data).getUint32(0, true);
      const done = () => this.send({ drawn: camera });
      this.handlers.picture(camera, new Blob([new Uint8Array(data, 8)], { type: "image/jpeg" }), done);
    }
  }

  judge() {
    const silent = performance.now() - this.heardAt;
    if (this.socket === null || this.socket.readyState > WebSocket.OPEN) {
      this.handlers.connection("lost", "connection lost", silent);
    } else if (this.socket.readyState === WebSocket.CONNECTING || this.tick < 0) {
      this.handlers.connection("connecting", "connecting …", silent);
    } else if (silent > SILENT_MS && !document.hidden) {
      this.handlers.connection("silent", "connection silent", silent);
    } else {
      this.handlers.connection("live", "live", 0);
    }
  }

  send(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  choose(channel) {
    this.channel = channel;
    this.send({ channel });
  }
}

/** Posts JSON; an answer that is no success becomes {ok: false, message}. */
export async function post(path, body) {
  try {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      keepalive: true,
      signal: AbortSignal.timeout(ANSWER_MS),
    });
    const text = await answer.text();
    try {
      return JSON.parse(text);
    } catch {
      return { ok: answer.ok, message: text };
    }
  } catch (error) {
    return { ok: false, message: `no answer from the dashboard (${error.message})` };
  }
}
