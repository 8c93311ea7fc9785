// A client of the Gateway service, made from protos/ alone: lists the models and streams a completion.
//
// Text goes to standard output, everything else to standard error. Exit status: 0; 1 for an error; 2 for wrong arguments;
// 130 after Ctrl-C.

import { fileURLToPath } from "node:url";
import { parseArgs, promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import { fromJSON, loadSync } from "@grpc/proto-loader";

const { enginehouse } = grpc.loadPackageDefinition(
  loadSync("protos/v1/gateway.proto", {
    includeDirs: [fileURLToPath(new URL("../../..", import.meta.url))], // where protos/ is
    keepCase: true, // max_tokens, as the .proto files write it, not maxTokens
    longs: String, // a JavaScript number is exact up to 2 ** 53 only; int64 and uint64 have 64 bits
    enums: String, // FINISH_REASON_LENGTH, not 2
    defaults: true, // of what is not on the wire, except optional fields and messages
  }),
);

// What an error's trailers carry: google.rpc.Status, with details that google.rpc.ErrorInfo may be among.
const rpc = fromJSON({
  nested: {
    Status: { fields: { details: { rule: "repeated", type: "Any", id: 3 } } },
    Any: { fields: { type_url: { type: "string", id: 1 }, value: { type: "bytes", id: 2 } } },
    ErrorInfo: { fields: { reason: { type: "string", id: 1 } } },
  },
});

const USAGE = "client.mjs [--gateway HOST:PORT] --model NAME --prompt TEXT [--token-ids] [--max-tokens N] [--seed N]";

/** The gateway's address, and what is asked of Generate. */
function readArguments() {
  const string = { type: "string" };
  const { values } = parseArgs({
    options: {
      gateway: { ...string, default: "127.0.0.1:8400" }, model: string, prompt: string, seed: string,
      "token-ids": { type: "boolean", default: false }, "max-tokens": { ...string, default: "64" },
    },
  });
  if (values.model === undefined || values.prompt === undefined) throw new Error("--model and --prompt are required");
  const request = {
    model: values.model,
    stopping: { max_tokens: Number(unsigned(values["max-tokens"], 32)) },
    sampling: values.seed === undefined ? { temperature: 0 } : { temperature: 1, seed: unsigned(values.seed, 64) },
  };
  if (values["token-ids"]) {
    request.token_ids = { ids: values.prompt.split(/\s+/).filter(Boolean).map((id) => Number(unsigned(id, 32))) };
  } else {
    request.text = values.prompt;
  }
  return [values.gateway, request];
}

/** The text of a number of so many bits, which the library would otherwise cut to them without a word. */
function unsigned(text, bits) {
  if (!/^\d+$/.test(text) || BigInt(text) >= 2n ** BigInt(bits)) throw new Error(`${text} is no number of ${bits} bits`);
  return text;
}

async function listModels(gateway) {
  const { models } = await promisify(gateway.ListModels).call(gateway, {});
  for (const model of models) {
    console.error(`${model.name}: executors ${model.ready_executors}, tokens at most ${model.max_seq_len}`);
  }
}

/** Prints text as it comes. Ctrl-C cancels the call, which ends with the status CANCELLED. */
async function generate(gateway, request) {
  const call = gateway.Generate(request);
  process.once("SIGINT", () => {
    interrupted = true;
    call.cancel();
  });
  for await (const { text, finish, usage } of call) {
    process.stdout.write(text);
    if (finish) {
      process.stdout.write("\n");
      console.error(`${finish.reason}: ${usage.prompt_tokens} + ${usage.completion_tokens} tokens`);
    }
  }
}

/** The status, the reason in google.rpc.ErrorInfo if the service gave one, and the message. */
function describe(error) {
  const [packed] = error.metadata.get("grpc-status-details-bin");
  const details = packed ? (rpc.Status.deserialize(packed).details ?? []) : [];
  const infos = details.filter((detail) => detail.type_url.endsWith("/google.rpc.ErrorInfo"));
  const reasons = infos.map((info) => rpc.ErrorInfo.deserialize(info.value).reason);
  return `${[grpc.status[error.code], ...reasons].join(" ")}: ${error.details}`;
}

let interrupted = false;
let gateway, request;
try {
  let address;
  [address, request] = readArguments();
  gateway = new enginehouse.v1.Gateway(address, grpc.credentials.createInsecure());
} catch (error) {
  console.error(`usage: ${USAGE}\nclient.mjs: error: ${error.message}`);
  process.exit(2);
}
try {
  await listModels(gateway);
  await generate(gateway, request);
} catch (error) {
  if (!(error.code in grpc.status)) throw error;
  console.error(interrupted ? "\ncancelled" : describe(error));
  process.exitCode = interrupted ? 130 : 1;
} finally {
  gateway.close();
}
