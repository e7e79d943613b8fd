import jakarta.servlet.http.HttpServletRequest;
import java.util.regex.Pattern;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.EnableAutoConfiguration;
import org.springframework.boot.web.server.servlet.context.ServletWebServerInitializedEvent;
import org.springframework.context.event.EventListener;
import org.springframework.http.ResponseEntity;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.RestController;

/** A Spring Boot application: Spring MVC on Tomcat. */
@EnableAutoConfiguration
@RestController
public class App {
    private static final Pattern HOSTS =
            Pattern.compile("(api|.+\\.wild)\\.example\\.com|\\[2001:db8::1\\]", Pattern.CASE_INSENSITIVE);

    @GetMapping({"/v1/orders/{id}", "/public/admin", "/admin", "/admin/", "/admin/**"})
    public ResponseEntity<Void> limited(HttpServletRequest request) {
        return answer(request, "limited");
    }

    @GetMapping({"/healthz", "/static", "/static/", "/static/**"})
    public ResponseEntity<Void> exempt(HttpServletRequest request) {
        return answer(request, "exempt");
    }

    @GetMapping("/**")
    public ResponseEntity<Void> other(HttpServletRequest request) {
        return answer(request, "other");
    }

    private static ResponseEntity<Void> answer(HttpServletRequest request, String handler) {
        boolean ours = HOSTS.matcher(request.getServerName()).matches();
        return ResponseEntity.ok().header("x-handler", ours ? handler : "other").build();
    }

    @EventListener
    public void started(ServletWebServerInitializedEvent event) {
        System.out.println(event.getWebServer().getPort());
    }

    public static void main(String[] args) {
        SpringApplication.run(App.class,
                "--server.address=127.0.0.1", "--server.port=0",
                "--spring.main.banner-mode=off", "--logging.level.root=off");
    }
}
