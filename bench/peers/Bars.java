import com.fasterxml.jackson.annotation.JsonIgnoreProperties;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Locale;
import java.util.Map;
import java.util.Properties;
import java.util.TreeMap;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.KeyValue;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.KStream;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.kstream.Repartitioned;
import org.apache.kafka.streams.kstream.Suppressed;
import org.apache.kafka.streams.kstream.TimeWindows;
import org.apache.kafka.streams.processor.api.ContextualProcessor;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.Stores;

/** One-minute bars with the DSL of Kafka Streams: windows in memory with a changelog, final results at their close. */
public class Bars {
    static final ObjectMapper JSON = new ObjectMapper();
    static final long EVENTS = Long.parseLong(System.getenv("BENCH_EVENTS"));
    static final Path RESULT = Path.of(System.getenv("BENCH_RESULT"));
    static final Map<String, Double> TIMES = new TreeMap<>();
    static long count;

    @JsonIgnoreProperties(ignoreUnknown = true)
    public static class Trade {
        public String pair;
        public double p, s;
        public long t;
    }

    public static class Bar {
        public double o, h, l, c, v, pv;
        public long n;

        Bar add(Trade trade) {
            if (n++ == 0) {
                o = h = l = trade.p;
            }
            h = Math.max(h, trade.p);
            l = Math.min(l, trade.p);
            c = trade.p;
            v += trade.s;
            pv += trade.p * trade.s;
            return this;
        }
    }

    public record Out(String pair, long start, double o, double h, double l, double c, double v, double vw, long n) {}

    /** An array is one record; each trade in it gets its own key and time. */
    static class Split extends ContextualProcessor<String, Trade[], String, Trade> {
        @Override
        public void process(Record<String, Trade[]> record) {
            for (Trade trade : record.value()) {
                context().forward(new Record<>(trade.pair, trade, trade.t));
            }
        }
    }

    static <T> Serde<T> json(Class<T> type) {
        return Serdes.serdeFrom(
                (topic, value) -> {
                    try {
                        return value == null ? null : JSON.writeValueAsBytes(value);
                    } catch (IOException error) {
                        throw new UncheckedIOException(error);
                    }
                },
                (topic, bytes) -> {
                    try {
                        return bytes == null ? null : JSON.readValue(bytes, type);
                    } catch (IOException error) {
                        throw new UncheckedIOException(error);
                    }
                });
    }

    /** The meter: when the first, the middle and the last trade came. */
    static void event() {
        count++;
        String name = count == 1 ? "first" : count == EVENTS / 2 ? "half" : count == EVENTS ? "last" : null;
        if (name != null) {
            TIMES.put(name, System.currentTimeMillis() / 1e3);
            StringBuilder text = new StringBuilder();
            TIMES.forEach((key, time) -> text.append(text.isEmpty() ? "" : ",")
                    .append(String.format(Locale.ROOT, "\"%s\":%.3f", key, time)));
            try {
                Files.writeString(RESULT, "{" + text + "}");
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }
    }

    public static void main(String[] arguments) {
        boolean arrays = System.getenv("BENCH_SHAPE").equals("arrays");
        String source = System.getenv("BENCH_SOURCE");
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, System.getenv("BENCH_GROUP"));
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, System.getenv("BENCH_BROKER"));
        settings.put(StreamsConfig.STATE_DIR_CONFIG, System.getenv("BENCH_STATE"));
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, 1);
        settings.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, 1000); // with 30 s, its default, bars come that late
        settings.put("auto.offset.reset", "earliest");
        settings.put("compression.type", "lz4");

        StreamsBuilder builder = new StreamsBuilder();
        KStream<String, Trade> trades = arrays
                ? builder.stream(source, Consumed.with(Serdes.String(), json(Trade[].class))).process(Split::new)
                : builder.stream(source, Consumed.with(Serdes.String(), json(Trade.class))
                        .withTimestampExtractor((record, before) -> ((Trade) record.value()).t));
        Duration window = Duration.ofSeconds(60), grace = Duration.ofSeconds(2);
        if (arrays) { // its own, hidden, made plain, so that the meter stands behind it
            trades = trades.repartition(Repartitioned.with(Serdes.String(), json(Trade.class)));
        }
        trades.peek((pair, trade) -> event())
                .groupByKey(Grouped.with(Serdes.String(), json(Trade.class)))
                .windowedBy(TimeWindows.ofSizeAndGrace(window, grace))
                .aggregate(Bar::new, (pair, trade, bar) -> bar.add(trade),
                        Materialized.<String, Bar>as(
                                        Stores.inMemoryWindowStore("bars", window.plus(grace), window, false))
                                .withKeySerde(Serdes.String()).withValueSerde(json(Bar.class)))
                .suppress(Suppressed.untilWindowCloses(Suppressed.BufferConfig.unbounded()))
                .toStream()
                .map((key, bar) -> KeyValue.pair(key.key(), new Out(key.key(), key.window().start(),
                        bar.o, bar.h, bar.l, bar.c, bar.v, bar.pv / bar.v, bar.n)))
                .to(System.getenv("BENCH_SINK"), Produced.with(Serdes.String(), json(Out.class)));
        KafkaStreams streams = new KafkaStreams(builder.build(), settings);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> streams.close(Duration.ofSeconds(5))));
        streams.start();
    }
}
