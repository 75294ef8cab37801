/* Browsers refuse web workers to pages that are files. The theme's search needs one: here, a frame does its work. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.documentElement.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
      inside.importScripts = async (...urls) => { for (const each of urls) await this.load(each); };
      this.load(url).then(() => {
        this.isLoaded = true;
        for (const data of this.waiting) this.deliver(data);
      });
    }
    load(url) {
      return new Promise((done, failed) => {
        const script = this.frame.contentDocument.createElement("script");
        Object.assign(script, {src: url, onload: done, onerror: failed});
        this.frame.contentDocument.documentElement.append(script);
      });
    }
    postMessage(data) {
      if (this.isLoaded) this.deliver(data); else this.waiting.push(data);
    }
    deliver(data) {
      const inside = this.frame.contentWindow;
      inside.dispatchEvent(new inside.MessageEvent("message", {data}));
    }
    terminate() { this.frame.remove(); }
  };
}
