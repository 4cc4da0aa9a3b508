// Starts worker.js in a classic worker, as LiteRT.js needs one: it calls importScripts, which modules do not have.
const worker = import('./worker.js');
self.onmessage = async ({ data }) => (await worker).answer(data);
