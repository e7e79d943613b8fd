import io.javalin.Javalin;
import io.javalin.http.Handler;
import java.util.regex.Pattern;

/** A Javalin application, on Jetty. */
public class App {
    private static final Pattern HOSTS =
            Pattern.compile("(api|.+\\.wild)\\.example\\.com|\\[2001:db8::1\\]", Pattern.CASE_INSENSITIVE);

    private static Handler ran(String handler) {
        return context -> {
            boolean ours = HOSTS.matcher(context.req().getServerName()).matches();
            context.header("x-handler", ours ? handler : "other");
        };
    }

    public static void main(String[] args) {
        Javalin app = Javalin.create(config -> {
            config.startup.showJavalinBanner = false;
            config.routes.get("/v1/orders/{id}", ran("limited"));
            config.routes.get("/public/admin", ran("limited"));
            config.routes.get("/admin", ran("limited"));
            config.routes.get("/admin/", ran("limited"));
            config.routes.get("/admin/<rest>", ran("limited"));
            config.routes.get("/healthz", ran("exempt"));
            config.routes.get("/static", ran("exempt"));
            config.routes.get("/static/", ran("exempt"));
            config.routes.get("/static/<rest>", ran("exempt"));
            config.routes.get("/", ran("other"));
            config.routes.get("/<rest>", ran("other"));
        });
        app.start("127.0.0.1", 0);
        System.out.println(app.port());
    }
}
