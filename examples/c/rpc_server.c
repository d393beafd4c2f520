/* An RPC server: answers each call for an identifier with its body.
 *
 *     rpc_server CONFIG IDENTIFIER
 *
 * It ends by SIGTERM or SIGINT.
 */
#include "namedpipe.h"

static volatile sig_atomic_t over;

static void end(int number)
{
    (void)number;
    over = 1;
}

static char *quoted(const char *identifier) /* C2 */
{
    char *text = malloc(3 * strlen(identifier) + 1), *to = text;
    for (const char *at = identifier; *at; at++) {
        int plainly = strchr("abcdefghijklmnopqrstuvwxyz0123456789._~-", *at) && !(*at == '.' && at == identifier);
        to += plainly ? sprintf(to, "%c", *at) : sprintf(to, "%%%02x", (unsigned char)*at);
    }
    if (to == text || to - text > 200)
        die("this program has no SHA-256 for an identifier of that length");
    return text;
}

int main(int count, char **arguments)
{
    static struct reader calls, answers;
    char name[128];
    if (count < 3)
        die("usage: rpc_server CONFIG IDENTIFIER");
    struct sigaction action = {.sa_handler = end};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    find_directories(arguments[1]);
    lock_id();
    sprintf(name, "rpc_%s", worker_id);
    read_from(&answers, reply);
    read_from(&calls, name);
    come(",\"rpc\":true");
    char *id = quoted(arguments[2]), *route = text_of("%s/route_%s", pipes, id);
    if (symlink(name, route)) /* C1: EEXIST for all but one */
        die("%s is taken: %s", arguments[2], strerror(errno));
    printf("ready\n");
    fflush(stdout);
    while (!over) {
        char *message = next(&calls, -1), *to, *body;
        if (!message)
            continue;
        to = plain(field(message, "to")), body = field(message, "body");
        if (body && to && !strcmp(to, arguments[2]))
            answer(message, "result", body);
        else
            answer(message, "undelivered", "\"nobody here is called so\""); /* C5 */
        free(message), free(to), free(body);
    }
    unlink(route); /* L6 */
    leave(name);
    free(id), free(route);
    return 0;
}
