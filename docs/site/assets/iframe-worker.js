// Search runs in a worker, which browsers refuse to a page that is opened from a disk. There a frame runs it instead.
// (The name is the one by which zensical finds that this is taken care of.)
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<!doctype html>"
      this.ready = new Promise((resolve, reject) => {
        this.frame.onload = () => {
          const inside = this.frame.contentWindow
          inside.postMessage = data => setTimeout(() => this.onmessage?.({ data }))
          const script = inside.document.createElement("script")
          script.src = new URL(url, location)
          script.onload = () => resolve(inside)
          script.onerror = reject
          inside.document.body.append(script)
        }
      })
      this.ready.catch(error => this.onerror?.(error))
      document.body.append(this.frame)
    }
    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })), () => {})
    }
    terminate() {
      this.frame.remove()
    }
  }
}
