// Explains one image: node explain.mjs IMAGE MODEL/LAYER/BANK [HOST:PORT]
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const CONTRACT = fileURLToPath(new URL("../../proto", import.meta.url));
const DEADLINE_S = 30;
const REPLY_BYTES = 64 * 2 ** 20;

const [path, bank, address = "localhost:9000"] = process.argv.slice(2);
if (bank === undefined) {
  console.error("usage: node explain.mjs IMAGE MODEL/LAYER/BANK [HOST:PORT]");
  process.exit(2);
}
let picture;
try {
  picture = readFileSync(path);
} catch (error) {
  console.error(error.message);
  process.exit(2);
}

const contract = loadSync("whence/v1/explanation_service.proto", { includeDirs: [CONTRACT], defaults: true });
const { ExplanationService } = grpc.loadPackageDefinition(contract).whence.v1;
const client = new ExplanationService(address, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": REPLY_BYTES,
});

const metadata = new grpc.Metadata();
metadata.set("application", "whence"); // which of the applications behind the address
const request = {
  image: { encoded: picture },
  bank,
  options: { topK: 5 },
  deadline: { seconds: DEADLINE_S },
};
client.explain(request, metadata, { deadline: Date.now() + 1000 * DEADLINE_S }, (error, reply) => {
  client.close();
  if (error) {
    console.error(`${grpc.status[error.code]}: ${error.details}`);
    process.exitCode = 1;
    return;
  }
  const { target, concepts, unexplained, faithfulness } = reply.explanation;
  console.log(`${target.name}  ${(100 * target.probability).toFixed(1)} %  logit ${target.logit.toFixed(2)}`);
  for (const { contribution, share, id, label } of concepts) {
    const percent = `${(100 * share).toFixed(0)} %`;
    console.log(`${contribution.toFixed(3).padStart(9)}  ${percent.padStart(5)}  ${label || `concept ${id}`}`);
  }
  console.log(`not explained: ${(unexplained ?? 0).toFixed(3)}; constant: ${faithfulness.constant.toFixed(3)}`);
});
